//! `top` in a terminal, which tmux emulates.

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::harness::{Agent, PATIENCE};
use crate::namespaces;
use crate::support;
use crate::world::World;

/// A port that no world has a server on, nor any other test.
const WATCHED: u16 = 6003;

fn process_name() -> String {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    name.trim_end().to_owned()
}

/// A terminal of its own.
struct Screen(String);

impl Screen {
    /// With a shell in it; `None` without tmux.
    fn open(name: &str) -> Option<Self> {
        if Command::new("tmux").arg("-V").output().is_err() {
            support::skipped("top in a terminal", "tmux is missing");
            return None;
        }
        let screen = Self(format!("connmon-{name}-{}", std::process::id()));
        screen.tmux(&["new-session", "-d", "-x", "100", "-y", "40", "sh"]);
        screen.tmux(&["set-option", "-g", "status", "off"]);
        Some(screen)
    }

    /// Types a line.
    fn line(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]);
        self.tmux(&["send-keys", "Enter"]);
    }

    /// The settings of the terminal, as the shell's commands meet them.
    fn settings(&self, directory: &Path, when: &str) -> String {
        let file = directory.join(when);
        self.line(&format!("stty -g > {}", file.display()));
        let until = Instant::now() + PATIENCE;
        loop {
            let settings = std::fs::read_to_string(&file).unwrap_or_default();
            if settings.ends_with('\n') {
                return settings;
            }
            assert!(Instant::now() < until, "no stty");
            sleep(Duration::from_millis(50));
        }
    }

    fn tmux(&self, args: &[&str]) -> String {
        let output = Command::new("tmux")
            .args(["-L", &self.0, "-f", "/dev/null"])
            .args(args)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tmux {args:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn until(&self, what: &str, good: impl Fn(&str) -> bool) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            let screen = self.tmux(&["capture-pane", "-p"]);
            if good(&screen) {
                return screen;
            }
            assert!(Instant::now() < until, "{what} never came:\n{screen}");
            sleep(Duration::from_millis(100));
        }
    }

    /// Facts of the pane, by tmux's names.
    fn facts(&self, format: &str) -> String {
        let said = self.tmux(&["display-message", "-p", format]);
        said.trim_end().to_owned()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = Command::new("tmux")
            .args(["-L", &self.0, "kill-server"])
            .status();
    }
}

/// In namespaces of its own, so that nothing else on this machine counts.
#[test]
fn top_switches_resizes_and_restores_the_terminal() {
    if !namespaces::may_run("top in a terminal") {
        return;
    }
    let Some(screen) = Screen::open("top") else {
        return;
    };
    let world = World::new();
    let listener = world.listen(WATCHED);
    let held = world.outbound("JP", WATCHED, 9);
    let accepted: Vec<_> = (0..9).map(|_| listener.accept().unwrap()).collect();
    let directory = tempfile::tempdir().unwrap();
    let before = screen.settings(directory.path(), "before");
    screen.line(&format!(
        "{} top --geoip.database {}; echo back with $?",
        Agent::binary().get_program().display(),
        world.database().display(),
    ));
    // NOW of the line that starts so.
    let now = |text: &str, start: &str| -> Option<String> {
        let line = text.lines().find_map(|line| line.strip_prefix(start))?;
        Some(line.split_whitespace().next()?.to_owned())
    };
    screen.until("countries", |text| {
        text.contains("COUNTRY") && now(text, "JP ").as_deref() == Some("9")
    });
    screen.tmux(&["send-keys", "p"]);
    let inbound = format!("{WATCHED} in ");
    screen.until("ports", |text| {
        text.contains("PORT") && now(text, &inbound).as_deref() == Some("9")
    });
    screen.tmux(&["resize-window", "-x", "60", "-y", "12"]);
    screen.until("a smaller screen", |text| {
        screen.facts("#{pane_width}x#{pane_height}") == "60x12"
            && text.starts_with("connmon top")
            && text.contains("PORT")
            && text.lines().all(|line| line.chars().count() <= 60)
    });
    // Both at once: neither may get lost.
    screen.tmux(&[
        "resize-window",
        "-x",
        "100",
        "-y",
        "30",
        ";",
        "send-keys",
        "r",
    ]);
    screen.until("processes, in a wide window", |text| {
        text.contains("PROCESS") && text.contains("SENT/s") && text.contains(&process_name())
    });
    screen.tmux(&["send-keys", "C-c"]);
    screen.until("the shell", |text| text.contains("back with 0"));
    drop((held, accepted));
    assert_eq!(before, screen.settings(directory.path(), "after"));
    assert_eq!(screen.facts("#{alternate_on}#{cursor_flag}"), "01");
}

/// By polling: needs no privilege.
fn top() -> String {
    let binary = Agent::binary();
    format!("{} top --source proc", binary.get_program().display())
}

#[test]
fn top_fills_a_console_that_reports_no_size() {
    let Some(screen) = Screen::open("no-size") else {
        return;
    };
    screen.line(&format!("stty rows 0 cols 0; {}", top()));
    screen.until("the table", |text| {
        text.starts_with("connmon top: ") && text.contains("COUNTRY") && text.contains("RECV/s")
    });
}

#[test]
fn top_shows_what_fits_and_never_scrolls() {
    let Some(screen) = Screen::open("few-rows") else {
        return;
    };
    screen.line(&top());
    screen.until("the table", |text| {
        text.starts_with("connmon top: ") && text.contains("c country  p port")
    });
    for rows in ["5", "4", "3", "2", "1"] {
        screen.tmux(&["resize-window", "-x", "100", "-y", rows]);
        screen.until("the first lines", |text| {
            let mut lines = text.lines();
            screen.facts("#{pane_height}") == rows
                && lines
                    .next()
                    .is_some_and(|line| line.starts_with("connmon top: "))
                && lines.next().is_none_or(|line| line.starts_with("COUNTRY"))
        });
    }
}

#[test]
fn top_sends_a_dumb_terminal_plain_lines() {
    let Some(screen) = Screen::open("dumb") else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("output");
    screen.tmux(&["pipe-pane", &format!("cat > {}", output.display())]);
    screen.line(&format!("TERM=dumb {}; echo back with $?", top()));
    screen.until("two refreshes", |text| {
        text.matches("connmon top: ").count() >= 3
    });
    // Not in raw mode: keys are lines.
    screen.line("p");
    screen.until("ports", |text| text.contains("PORT "));
    screen.line("q");
    screen.until("the shell", |text| text.contains("back with 0"));
    let output = std::fs::read(output).unwrap();
    assert!(
        !output.contains(&0x1b),
        "{}",
        String::from_utf8_lossy(&output)
    );
    assert!(output.windows(7).any(|word| word == b"COUNTRY"));
}

#[test]
fn top_stops_for_ctrl_z_and_comes_back() {
    let Some(screen) = Screen::open("ctrl-z") else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let before = screen.settings(directory.path(), "before");
    let in_view = || {
        screen.until("the table", |text| {
            text.starts_with("connmon top: ")
                && text.contains("COUNTRY")
                && screen.facts("#{alternate_on}#{cursor_flag}") == "10"
        });
    };
    screen.line(&top());
    for when in ["first", "second"] {
        in_view();
        screen.tmux(&["send-keys", "C-z"]);
        screen.until("the shell", |text| {
            text.contains("Stopped") && screen.facts("#{alternate_on}#{cursor_flag}") == "01"
        });
        assert_eq!(before, screen.settings(directory.path(), when), "{when}");
        screen.line("clear; fg");
    }
    in_view();
    screen.tmux(&["send-keys", "q"]);
    // What is typed before that is read as keys.
    screen.until("the shell", |_| {
        screen.facts("#{alternate_on}#{cursor_flag}") == "01"
    });
    screen.line("echo back with $?");
    screen.until("the shell", |text| text.contains("back with 0"));
    assert_eq!(before, screen.settings(directory.path(), "after"));
}

/// Stopped, continued in the background and asked to end at once.
#[test]
fn top_that_is_killed_while_stopped_ends() {
    let Some(screen) = Screen::open("killed") else {
        return;
    };
    screen.line(&top());
    screen.until("the table", |text| text.contains("COUNTRY"));
    screen.tmux(&["send-keys", "C-z"]);
    screen.until("the shell", |text| text.contains("Stopped"));
    screen.line("kill -TERM %1; kill -CONT %1; wait; echo back with $?");
    screen.until("the shell", |text| text.contains("back with 0"));
}
