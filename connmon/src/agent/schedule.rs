//! When to walk the kernel's tables, and why. Pure: time is an argument.

use std::time::Duration;

use connmon_core::scan::{Trigger, Walk};

const SECOND_NS: u64 = 1_000_000_000;

/// How soon after a loss the next audit starts; losses within it are one.
const LOSS_DELAY_NS: u64 = SECOND_NS / 4;

/// How soon a second audit follows one that found entries absent: removal
/// needs absence from two audits.
const FOLLOW_UP_NS: u64 = SECOND_NS;

/// Audits that may run ahead of their share of a core: one for a loss, and the
/// one after it that settles what it left open. Further losses wait, so that a
/// storm does not become one of audits.
const AHEAD: u32 = 2;

/// What a walk that ended means for the next ones.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Interval of audits, stretched by what they cost.
    pub audit_every: Duration,
    /// The same for traffic samples.
    pub traffic_every: Option<Duration>,
    /// The rest that this walk's cost asks for.
    pub rest: Duration,
    /// Entries wait for a second absence: audit soon.
    pub suspects: bool,
    /// Listeners wait for their owners: go on with them at once.
    pub owners_wait: bool,
}

/// Due times of audits and traffic samples; one walk serves both.
#[derive(Debug)]
pub struct Schedule {
    audit_every_ns: u64,
    traffic_every_ns: Option<u64>,
    next_audit_ns: u64,
    next_traffic_ns: u64,
    /// Reasons to audit early.
    loss_due_ns: Option<u64>,
    follow_up_ns: Option<u64>,
    /// When the audits so far will have taken no more than their share.
    paid_ns: u64,
    /// How far ahead of that an early one may run.
    ahead_ns: u64,
    owners_wait: bool,
    running: bool,
}

impl Schedule {
    /// The startup walk is under way; everything else is due later.
    pub fn new(now_ns: u64, audit_every: Duration, traffic_every: Option<Duration>) -> Self {
        let audit_every_ns = nanoseconds(audit_every);
        let traffic_every_ns = traffic_every.map(nanoseconds);
        Self {
            audit_every_ns,
            traffic_every_ns,
            next_audit_ns: now_ns.saturating_add(audit_every_ns),
            next_traffic_ns: now_ns.saturating_add(traffic_every_ns.unwrap_or(u64::MAX)),
            loss_due_ns: None,
            follow_up_ns: None,
            paid_ns: now_ns,
            ahead_ns: 0,
            owners_wait: false,
            running: true,
        }
    }

    /// Events were lost: audit soon. Repeated calls before that audit starts
    /// are one; a loss during a walk leads to one more after it.
    pub fn loss(&mut self, now_ns: u64) {
        self.loss_due_ns.get_or_insert(now_ns + LOSS_DELAY_NS);
    }

    /// The walk to start now, if one is due and none is running.
    pub fn due(&mut self, now_ns: u64) -> Option<Walk> {
        if self.running {
            return None;
        }
        let may_run_early = self.paid_ns.saturating_sub(now_ns) <= self.ahead_ns;
        let is_due = |at: Option<u64>| may_run_early && at.is_some_and(|at| now_ns >= at);
        let lost = is_due(self.loss_due_ns);
        let audit = lost || is_due(self.follow_up_ns) || now_ns >= self.next_audit_ns;
        let traffic = self.traffic_every_ns.is_some() && now_ns >= self.next_traffic_ns;
        if !audit && !traffic && !self.owners_wait {
            return None;
        }
        if lost {
            self.loss_due_ns = None;
        }
        // Alone, a walk for the owners of listeners reads nothing else; an
        // audit finds them anyway.
        self.owners_wait &= traffic && !audit;
        self.running = true;
        Some(Walk {
            trigger: if lost {
                Trigger::Loss
            } else {
                Trigger::Interval
            },
            traffic,
            audit,
        })
    }

    /// A walk ended.
    pub fn finished(&mut self, now_ns: u64, walk: Walk, ended: Ended) {
        self.running = false;
        self.audit_every_ns = nanoseconds(ended.audit_every);
        self.traffic_every_ns = ended.traffic_every.map(nanoseconds);
        self.owners_wait |= ended.owners_wait;
        if walk.traffic {
            self.next_traffic_ns = now_ns.saturating_add(self.traffic_every_ns.unwrap_or(u64::MAX));
        }
        if walk.audit {
            let rest_ns = nanoseconds(ended.rest);
            self.paid_ns = self.paid_ns.max(now_ns).saturating_add(rest_ns);
            self.ahead_ns = rest_ns.saturating_mul(AHEAD.into());
            self.next_audit_ns = now_ns.saturating_add(self.audit_every_ns).max(self.paid_ns);
            self.follow_up_ns = ended.suspects.then_some(now_ns + FOLLOW_UP_NS);
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUDIT: Duration = Duration::from_secs(60);
    const TRAFFIC: Option<Duration> = Some(Duration::from_secs(15));

    fn free() -> Ended {
        costing(Duration::ZERO)
    }

    /// After a walk of this CPU time.
    fn costing(cost: Duration) -> Ended {
        let rest = cost * 200;
        Ended {
            audit_every: AUDIT.max(rest),
            traffic_every: TRAFFIC,
            rest,
            suspects: false,
            owners_wait: false,
        }
    }

    const STARTUP: Walk = Walk {
        trigger: Trigger::Startup,
        traffic: true,
        audit: true,
    };

    fn settled() -> Schedule {
        let mut schedule = Schedule::new(0, AUDIT, TRAFFIC);
        schedule.finished(0, STARTUP, free());
        schedule
    }

    #[test]
    fn nothing_is_due_while_a_walk_runs() {
        let mut schedule = Schedule::new(0, AUDIT, TRAFFIC);
        assert_eq!(schedule.due(1_000 * SECOND_NS), None);
    }

    #[test]
    fn traffic_and_audit_coincide_in_one_walk() {
        let mut schedule = settled();
        assert_eq!(schedule.due(14 * SECOND_NS), None);
        let walk = schedule.due(60 * SECOND_NS).unwrap();
        assert!(walk.audit && walk.traffic);
    }

    #[test]
    fn losses_are_one_walk_within_a_second() {
        let mut schedule = settled();
        schedule.loss(SECOND_NS);
        schedule.loss(SECOND_NS + 1);
        assert_eq!(schedule.due(SECOND_NS), None);
        let walk = schedule.due(2 * SECOND_NS - 1).unwrap();
        assert_eq!(walk.trigger, Trigger::Loss);
        schedule.finished(2 * SECOND_NS, walk, free());
        assert_eq!(schedule.due(3 * SECOND_NS), None);
    }

    #[test]
    fn a_suspect_brings_the_next_audit_forward() {
        let mut schedule = settled();
        let walk = schedule.due(60 * SECOND_NS).unwrap();
        let ended = Ended {
            suspects: true,
            ..costing(Duration::from_millis(100))
        };
        schedule.finished(60 * SECOND_NS, walk, ended);
        let follow_up = schedule.due(61 * SECOND_NS).unwrap();
        assert!(follow_up.audit && !follow_up.traffic);
    }

    #[test]
    fn listeners_wait_for_owners_but_not_for_the_next_audit() {
        let mut schedule = Schedule::new(0, AUDIT, TRAFFIC);
        let ended = Ended {
            owners_wait: true,
            ..free()
        };
        schedule.finished(SECOND_NS, STARTUP, ended);
        let walk = schedule.due(SECOND_NS).unwrap();
        assert!(!walk.audit && !walk.traffic);
        schedule.finished(SECOND_NS, walk, free());
        assert_eq!(schedule.due(2 * SECOND_NS), None);
    }

    #[test]
    fn lasting_loss_costs_half_a_percent_and_two_audits() {
        for cost_ms in [1, 30, 1_000] {
            let cost = Duration::from_millis(cost_ms);
            let mut schedule = Schedule::new(0, AUDIT, None);
            let startup = Ended {
                traffic_every: None,
                ..costing(cost)
            };
            schedule.finished(0, STARTUP, startup);
            let (mut spent, mut audits) = (Duration::ZERO, 0);
            for tick in 0..12_000_u64 {
                let now_ns = tick * SECOND_NS / 20;
                schedule.loss(now_ns);
                if let Some(walk) = schedule.due(now_ns) {
                    assert!(walk.audit);
                    audits += 1;
                    spent += cost;
                    let ended = Ended {
                        suspects: true,
                        traffic_every: None,
                        ..costing(cost)
                    };
                    schedule.finished(now_ns, walk, ended);
                }
            }
            let share = Duration::from_secs(600) / 200;
            assert!(spent <= share + cost * (AHEAD + 1), "{cost:?}: {spent:?}");
            assert!(audits >= 2, "{cost:?}: the first losses are healed at once");
        }
    }
}
