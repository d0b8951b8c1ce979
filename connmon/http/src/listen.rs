//! Listening sockets: bound before privileges are dropped, dual stack where
//! the host has IPv6.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

use crate::ConfigError;
use crate::address::{ListenAddress, ListenHost, resolve_all};

/// Connections the kernel completes while the server is busy; as many as
/// `net.core.somaxconn` allows.
const BACKLOG: i32 = 4096;

/// Looks up and binds every address.
///
/// # Errors
/// For the first that cannot be looked up or bound. The same address may be
/// free later, so the latter [is not yet](ConfigError::is_not_yet) right.
pub(crate) fn bind_all(addresses: &[ListenAddress]) -> Result<Vec<TcpListener>, ConfigError> {
    let resolved = resolve_all(addresses)?;
    bind_each(addresses, &resolved, bind, |note| log::info!("{note}"))
}

/// Binds by `bind`; a note about it goes to `note`, once.
fn bind_each<T>(
    addresses: &[ListenAddress],
    resolved: &[SocketAddr],
    bind: impl Fn(SocketAddr) -> io::Result<T>,
    mut note: impl FnMut(String),
) -> Result<Vec<T>, ConfigError> {
    let mut noted = false;
    let one = |(listen, address): (&ListenAddress, &SocketAddr)| {
        let mut bound = bind(*address);
        if let Err(error) = &bound
            && listen.host == ListenHost::Any
            && lacks_ipv6(error)
        {
            if !std::mem::replace(&mut noted, true) {
                note(format!(
                    "IPv6 is off on this host ({error}); listening on IPv4 alone"
                ));
            }
            bound = bind((Ipv4Addr::UNSPECIFIED, listen.port).into());
        }
        bound.map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "address already in use (another process, maybe a second connmon, has the \
                     port; stop it or choose another)"
                }
                io::ErrorKind::PermissionDenied => {
                    "permission denied (a port below 1024 needs CAP_NET_BIND_SERVICE; choose \
                     another)"
                }
                io::ErrorKind::AddrNotAvailable => "no interface of this host has that address",
                _ => &error.to_string(),
            };
            let problem = format_args!("cannot listen on {}: {why}", listen.text);
            ConfigError::at(&listen.origin, problem).not_yet()
        })
    };
    addresses.iter().zip(resolved).map(one).collect()
}

/// Whether `[::]` cannot be bound because the host has no IPv6 at all: no such
/// address family (module absent, `ipv6.disable=1`), or no address of it
/// (`net.ipv6.conf.all.disable_ipv6=1`, where `inet6_bind` gives
/// EADDRNOTAVAIL).
fn lacks_ipv6(error: &io::Error) -> bool {
    let lacking = [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL];
    error
        .raw_os_error()
        .is_some_and(|errno| lacking.contains(&errno))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // A restart must not wait for connections of the last run in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind_one(listen: &ListenAddress) -> Result<TcpListener, ConfigError> {
        let mut bound = bind_all(std::slice::from_ref(listen))?;
        Ok(bound.remove(0))
    }

    fn any(text: &str) -> ListenAddress {
        let (host, port) = crate::address::parse(text).unwrap();
        ListenAddress {
            text: text.to_owned(),
            origin: "--web.listen-address".to_owned(),
            host,
            port,
        }
    }

    #[test]
    fn a_taken_port_names_the_address_and_the_remedy() {
        let first = bind_one(&any("127.0.0.1:0")).unwrap();
        let taken = any(&first.local_addr().unwrap().to_string());
        let error = bind_one(&taken).unwrap_err().to_string();
        assert!(error.contains(&taken.text), "{error}");
        assert!(error.contains("address already in use"), "{error}");
        assert!(error.contains("--web.listen-address"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn an_address_of_another_host_is_refused() {
        let error = bind_one(&any("192.0.2.1:0")).unwrap_err().to_string();
        assert!(error.contains("192.0.2.1:0"), "{error}");
        assert!(error.contains("no interface"), "{error}");
    }

    #[test]
    fn without_ipv6_any_is_ipv4_and_noted_once() {
        let without_ipv6 = |address: SocketAddr| match address {
            SocketAddr::V4(_) => Ok(address.to_string()),
            SocketAddr::V6(_) => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        };
        let mut notes = Vec::new();
        let both = [any(":1"), any(":2")];
        let resolved = resolve_all(&both).unwrap();
        let bound = bind_each(&both, &resolved, without_ipv6, |note| {
            notes.push(note);
        });
        assert_eq!(bound.unwrap(), ["0.0.0.0:1", "0.0.0.0:2"]);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("IPv4 alone"), "{notes:?}");
        // An explicit IPv6 address is bound or refused.
        let explicit = [any("[::]:3")];
        let resolved = resolve_all(&explicit).unwrap();
        let error = bind_each(&explicit, &resolved, without_ipv6, |_| {}).unwrap_err();
        assert!(error.to_string().contains("[::]:3"), "{error}");
    }

    #[test]
    fn errors_of_a_host_without_ipv6() {
        for (errno, lacks) in [
            (libc::EAFNOSUPPORT, true),
            (libc::EADDRNOTAVAIL, true),
            (libc::EADDRINUSE, false),
            (libc::EACCES, false),
        ] {
            assert_eq!(lacks_ipv6(&io::Error::from_raw_os_error(errno)), lacks);
        }
    }
}
