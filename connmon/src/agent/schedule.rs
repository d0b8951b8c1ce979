//! When the next walk over the kernel's socket tables starts, and for what: an
//! audit, a traffic sample or owners of listeners. Pure: time is an argument.

use std::time::Duration;

use connmon_core::scan::{Trigger, Walk};

const SECOND_NS: u64 = 1_000_000_000;

/// How soon after a loss the next audit starts; losses within it are one.
const LOSS_DELAY_NS: u64 = SECOND_NS / 4;

/// Losses are over when none came for so long: the counters are read every
/// 250 ms, or a tick later.
const QUIET_NS: u64 = 400_000_000;

/// How soon a second audit follows one that found entries absent, since only a
/// second absence removes them. After a loss it follows at once.
const FOLLOW_UP_NS: u64 = SECOND_NS;

/// Audits that may run ahead of their share of a core: the two after a loss, of
/// which the second removes what the first found absent, and two without one.
const AHEAD: u64 = 2;

/// While losses go on, audits may take this many times their usual share: 5 %
/// of a core.
const LOSS_SHARE: u64 = 10;

/// What a finished walk changes for the next ones.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Interval of audits, stretched by what they cost.
    pub audit_every: Duration,
    /// The same for traffic samples.
    pub traffic_every: Option<Duration>,
    /// The pause that keeps the cost of this walk within its share of a core.
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
    /// The first loss since the last audit for one began.
    loss: Option<u64>,
    last_loss_ns: u64,
    follow_up: Option<FollowUp>,
    usual: Budget,
    after_loss: Budget,
    owners_wait: bool,
    running: bool,
    /// The audit under way is one of the two after a loss.
    is_after_loss: bool,
}

#[derive(Clone, Copy, Debug)]
struct FollowUp {
    at_ns: u64,
    after_loss: bool,
}

/// A share of a core.
#[derive(Debug)]
struct Budget {
    /// From when on the audits so far have taken no more than it.
    paid_ns: u64,
    /// The pause after the last one.
    rest_ns: u64,
}

impl Budget {
    /// Whether an audit may start now; `ahead` may run before their share is due.
    fn allows(&self, now_ns: u64, ahead: u64) -> bool {
        self.paid_ns.saturating_sub(now_ns) <= self.rest_ns.saturating_mul(ahead)
    }

    fn pay(&mut self, now_ns: u64, rest_ns: u64) {
        self.paid_ns = self.paid_ns.max(now_ns).saturating_add(rest_ns);
        self.rest_ns = rest_ns;
    }
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
            loss: None,
            last_loss_ns: 0,
            follow_up: None,
            usual: Budget {
                paid_ns: now_ns,
                rest_ns: 0,
            },
            after_loss: Budget {
                paid_ns: now_ns,
                rest_ns: 0,
            },
            owners_wait: false,
            running: true,
            is_after_loss: false,
        }
    }

    /// Events were lost: audit soon. Repeated calls before that audit starts
    /// are one; a loss during a walk leads to one more after it.
    pub fn loss(&mut self, now_ns: u64) {
        self.loss.get_or_insert(now_ns);
        self.last_loss_ns = now_ns;
    }

    /// Whether an audit for a loss is due or may be under way.
    pub fn expects_loss(&self) -> bool {
        self.loss.is_some() || self.running || self.follow_up.is_some_and(|next| next.after_loss)
    }

    /// The walk to start now, if one is due and none is running.
    pub fn due(&mut self, now_ns: u64) -> Option<Walk> {
        if self.running {
            return None;
        }
        let lost = self.loss.is_some_and(|first_ns| {
            // While losses go on, two audits are kept for their end.
            let is_over = now_ns.saturating_sub(self.last_loss_ns) >= QUIET_NS;
            let ahead = if is_over { AHEAD } else { 0 };
            let soon_ns = first_ns.saturating_add(LOSS_DELAY_NS);
            now_ns >= soon_ns && self.after_loss.allows(now_ns, ahead)
        });
        // After another loss, the audit for that one follows up as well.
        let follow_up = self
            .follow_up
            .filter(|next| self.loss.is_none() && now_ns >= next.at_ns);
        let settles_loss =
            follow_up.is_some_and(|next| next.after_loss && self.after_loss.allows(now_ns, AHEAD));
        let follows_up =
            follow_up.is_some_and(|next| !next.after_loss && self.usual.allows(now_ns, AHEAD));
        let audit = lost || settles_loss || follows_up || now_ns >= self.next_audit_ns;
        let traffic = self.traffic_every_ns.is_some() && now_ns >= self.next_traffic_ns;
        if !audit && !traffic && !self.owners_wait {
            return None;
        }
        if lost {
            self.loss = None;
        }
        self.is_after_loss = lost || settles_loss;
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
            if self.is_after_loss {
                self.after_loss.pay(now_ns, rest_ns / LOSS_SHARE);
            } else {
                self.usual.pay(now_ns, rest_ns);
            }
            self.next_audit_ns = now_ns
                .saturating_add(self.audit_every_ns)
                .max(self.usual.paid_ns);
            let after_loss = walk.trigger == Trigger::Loss;
            self.follow_up = ended.suspects.then_some(FollowUp {
                at_ns: if after_loss {
                    // Only then is it known that no further loss follows.
                    now_ns.max(self.last_loss_ns.saturating_add(QUIET_NS))
                } else {
                    now_ns + FOLLOW_UP_NS
                },
                after_loss,
            });
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
    fn losses_within_a_second_are_one_walk() {
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
    fn owners_do_not_wait_for_the_next_audit() {
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
    fn after_a_loss_the_second_audit_follows_at_once() {
        let mut schedule = settled();
        schedule.loss(SECOND_NS);
        let lost = schedule.due(2 * SECOND_NS).unwrap();
        let cost = Duration::from_millis(50);
        let now_ns = 2 * SECOND_NS + 50_000_000;
        let suspects = Ended {
            suspects: true,
            ..costing(cost)
        };
        schedule.finished(now_ns, lost, suspects);
        let second = schedule.due(now_ns).unwrap();
        assert!(second.audit && second.trigger == Trigger::Interval);
        // A third one is no longer the loss's, and waits as any other.
        schedule.finished(now_ns, second, suspects);
        assert_eq!(schedule.due(now_ns + FOLLOW_UP_NS - 1), None);
        assert!(schedule.due(now_ns + FOLLOW_UP_NS).is_some());
    }

    /// Ticks and readings of the counters as the pipeline has them; what was
    /// spent until `end_ns`, when the first two audits that began after the
    /// losses were over did, and how many audits there were.
    fn with_losses(cost: Duration, losses_ns: u64, end_ns: u64) -> (Duration, Vec<u64>, u32) {
        const TICK_NS: u64 = SECOND_NS / 20;
        let mut schedule = Schedule::new(0, AUDIT, None);
        let ended = |suspects| Ended {
            suspects,
            traffic_every: None,
            ..costing(cost)
        };
        schedule.finished(0, STARTUP, ended(false));
        let (mut spent, mut audits, mut after) = (Duration::ZERO, 0, Vec::new());
        let mut under_way = None;
        for now_ns in (0..end_ns).step_by(TICK_NS as usize) {
            // Read every fifth tick, so the last loss is reported late.
            if now_ns <= losses_ns + SECOND_NS / 4 && now_ns.is_multiple_of(5 * TICK_NS) {
                schedule.loss(now_ns);
            }
            if let Some((walk, ends_ns)) = under_way
                && now_ns >= ends_ns
            {
                let first = after.len() == 1;
                schedule.finished(now_ns, walk, ended(now_ns <= losses_ns || first));
                under_way = None;
            }
            if let Some(walk) = schedule.due(now_ns) {
                assert!(walk.audit);
                audits += 1;
                spent += cost;
                under_way = Some((walk, now_ns + nanoseconds(cost)));
                if now_ns > losses_ns {
                    after.push(now_ns);
                }
            }
        }
        after.truncate(2);
        (spent, after, audits)
    }

    #[test]
    fn lasting_loss_costs_five_percent_and_two_audits() {
        for cost_ms in [1, 30, 1_000] {
            let cost = Duration::from_millis(cost_ms);
            let length = Duration::from_secs(600);
            let (spent, _, audits) = with_losses(cost, u64::MAX / 2, nanoseconds(length));
            assert!(
                spent <= length / 20 + cost * (AHEAD as u32 + 1),
                "{cost:?}: {spent:?}"
            );
            assert!(audits >= 2, "{cost:?}: the first losses are healed at once");
        }
    }

    #[test]
    fn two_audits_follow_lasting_losses_in_two_seconds() {
        for cost_ms in [1, 30, 150] {
            let cost = Duration::from_millis(cost_ms);
            for tenths in 1..100 {
                let losses_ns = tenths * SECOND_NS / 10;
                let (_, after, _) = with_losses(cost, losses_ns, losses_ns + 10 * SECOND_NS);
                let last_ns = after[1] + nanoseconds(cost);
                assert!(
                    last_ns <= losses_ns + 2 * SECOND_NS,
                    "{cost:?} {losses_ns}: {after:?}"
                );
            }
        }
    }
}
