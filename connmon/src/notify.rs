//! sd_notify(3): reports to systemd when the agent is ready, alive and
//! stopping.
//!
//! The socket is opened once, at start: the serving thread may not open one
//! later (see [`connmon_host::sandbox`]). The variables that systemd sets for
//! it are read here; `main` reads the rest of the environment.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The connection to the service manager; does nothing where there is none.
#[derive(Debug, Default)]
pub struct Notify {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Notify {
    /// From `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`. A socket
    /// that cannot be reached is logged, and the agent runs without it.
    pub fn from_env() -> Self {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
            return Self::default();
        };
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let watchdog = watchdog(
            number("WATCHDOG_USEC"),
            number("WATCHDOG_PID"),
            std::process::id(),
        );
        match connect(&path) {
            Ok(socket) => Self {
                socket: Some(socket),
                watchdog,
            },
            Err(error) => {
                log::warn!(
                    "cannot connect to NOTIFY_SOCKET {}: {error}: systemd is not notified that the \
                     agent is ready; use Type=exec, or let the agent reach the socket",
                    path.display()
                );
                Self::default()
            }
        }
    }

    /// How often [`Notify::alive`] must be called: in half the watchdog's time,
    /// as sd_watchdog_enabled(3) recommends.
    pub fn interval(&self) -> Option<Duration> {
        self.watchdog.map(|timeout| timeout / 2)
    }

    /// The agent serves: the initial scan is folded, or took so long that the
    /// agent serves without it (`connmon_up 0`). `systemctl status` shows
    /// `status`.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// What `systemctl status` shows.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", one_line(status)));
    }

    /// The fold answered: restarts the watchdog's time.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// The agent begins to stop.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, state: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(state.as_bytes()) {
            log::debug!("cannot send {state:?} to NOTIFY_SOCKET: {error}");
        }
    }
}

/// A path, or with a leading `@` a name in the abstract namespace.
fn connect(path: &OsStr) -> io::Result<UnixDatagram> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(path)?,
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "neither an absolute path nor an abstract name",
            ));
        }
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // The agent must not wait for a manager that does not read.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The watchdog's time, if it is meant for this process.
fn watchdog(usec: Option<u64>, pid: Option<u64>, own_pid: u32) -> Option<Duration> {
    let meant = pid.is_none_or(|pid| pid == u64::from(own_pid));
    let usec = usec.filter(|&usec| usec > 0 && meant)?;
    Some(Duration::from_micros(usec))
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(manager: &UnixDatagram) -> String {
        let timeout = Some(Duration::from_secs(10));
        manager.set_read_timeout(timeout).unwrap();
        let mut buffer = [0; 512];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    fn converse(name: &OsStr, manager: &UnixDatagram) {
        let notify = Notify {
            socket: Some(connect(name).unwrap()),
            watchdog: watchdog(Some(30_000_000), None, 1),
        };
        assert_eq!(notify.interval(), Some(Duration::from_secs(15)));
        // From within the sandbox of the serving thread.
        let plan = connmon_host::sandbox::Plan::new(
            connmon_host::sandbox::SandboxChoice::Auto,
            true,
            true,
        );
        std::thread::spawn(move || {
            plan.enter(connmon_host::sandbox::Role::Serve).unwrap();
            notify.ready("watching 3\nnamespaces");
            notify.alive();
            notify.stopping();
        })
        .join()
        .unwrap();
        assert_eq!(receive(manager), "READY=1\nSTATUS=watching 3 namespaces");
        assert_eq!(receive(manager), "WATCHDOG=1");
        assert_eq!(receive(manager), "STOPPING=1");
    }

    #[test]
    fn a_socket_path_receives_every_state() {
        let path = std::env::temp_dir().join(format!("connmon-notify-{}", std::process::id()));
        let manager = UnixDatagram::bind(&path).unwrap();
        converse(path.as_os_str(), &manager);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn an_abstract_socket_receives_every_state() {
        let name = format!("connmon-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        converse(OsStr::new(&format!("@{name}")), &manager);
    }

    #[test]
    fn without_a_manager_nothing_is_sent() {
        let notify = Notify::default();
        notify.ready("");
        notify.alive();
        assert_eq!(notify.interval(), None);
        assert!(connect(OsStr::new("vsock:2:1")).is_err());
        assert!(connect(OsStr::new("/nonexistent/connmon")).is_err());
    }

    #[test]
    fn the_watchdog_of_another_process_is_ignored() {
        assert_eq!(watchdog(Some(0), None, 7), None);
        assert_eq!(watchdog(Some(1_000), Some(8), 7), None);
        assert_eq!(watchdog(None, Some(7), 7), None);
        let ours = watchdog(Some(1_000), Some(7), 7);
        assert_eq!(ours, Some(Duration::from_millis(1)));
    }
}
