//! Listening sockets: bound before privileges are dropped, dual stack where
//! the host has IPv6.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

use crate::ServeError;
use crate::address::{ListenAddress, ListenHost, resolve_all};

/// Connections the kernel completes while the server is busy; as many as
/// `net.core.somaxconn` allows.
const BACKLOG: i32 = 4096;

/// Why an address cannot be listened on.
#[derive(Debug)]
pub struct BindError {
    origin: String,
    address: String,
    source: io::Error,
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            origin,
            address,
            source,
        } = self;
        write!(f, "{origin}: cannot listen on {address}: ")?;
        match source.kind() {
            io::ErrorKind::AddrInUse => write!(
                f,
                "address already in use (another process, maybe a second connmon, has the port; \
                 stop it or choose another)"
            ),
            io::ErrorKind::PermissionDenied => write!(
                f,
                "permission denied (a port below 1024 needs CAP_NET_BIND_SERVICE; choose another)"
            ),
            io::ErrorKind::AddrNotAvailable => {
                write!(f, "no interface of this host has that address")
            }
            _ => write!(f, "{source}"),
        }
    }
}

impl std::error::Error for BindError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Looks up and binds every address.
///
/// # Errors
/// For the first that cannot be looked up or bound.
pub(crate) fn bind_all(addresses: &[ListenAddress]) -> Result<Vec<TcpListener>, ServeError> {
    let resolved = resolve_all(addresses).map_err(ServeError::Address)?;
    let bound = bind_each(addresses, &resolved, bind_socket, |note| {
        log::info!("{note}")
    });
    bound.map_err(ServeError::Bind)
}

/// By way of `bind`; what is to be said about it is said once, by `say`.
fn bind_each<T>(
    addresses: &[ListenAddress],
    resolved: &[SocketAddr],
    bind: impl Fn(SocketAddr) -> io::Result<T>,
    mut say: impl FnMut(String),
) -> Result<Vec<T>, BindError> {
    let mut said = false;
    let one = |(listen, address): (&ListenAddress, &SocketAddr)| {
        let result = match bind(*address) {
            Err(error) if listen.host == ListenHost::Any && lacks_ipv6(&error) => {
                if !std::mem::replace(&mut said, true) {
                    say(format!(
                        "IPv6 is off on this host ({error}); listening on IPv4 alone"
                    ));
                }
                bind((Ipv4Addr::UNSPECIFIED, listen.port).into())
            }
            result => result,
        };
        result.map_err(|source| BindError {
            origin: listen.origin.clone(),
            address: listen.text.clone(),
            source,
        })
    };
    addresses.iter().zip(resolved).map(one).collect()
}

/// Whether `[::]` cannot be had because the host has no IPv6 at all: no such
/// address family (module absent, `ipv6.disable=1`), or no address of it
/// (`net.ipv6.conf.all.disable_ipv6=1`, where `inet6_bind` gives
/// EADDRNOTAVAIL).
fn lacks_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn bind_socket(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
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

    fn bind(listen: &ListenAddress) -> Result<TcpListener, ServeError> {
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
        let first = bind(&any("127.0.0.1:0")).unwrap();
        let taken = any(&first.local_addr().unwrap().to_string());
        let error = bind(&taken).unwrap_err().to_string();
        assert!(error.contains(&taken.text), "{error}");
        assert!(error.contains("address already in use"), "{error}");
        assert!(error.contains("--web.listen-address"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn an_address_of_another_host_is_refused() {
        let error = bind(&any("192.0.2.1:0")).unwrap_err().to_string();
        assert!(error.contains("192.0.2.1:0"), "{error}");
        assert!(error.contains("no interface"), "{error}");
    }

    #[test]
    fn without_ipv6_any_host_is_ipv4_and_that_is_said_once() {
        let without_ipv6 = |address: SocketAddr| match address {
            SocketAddr::V4(_) => Ok(address.to_string()),
            SocketAddr::V6(_) => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        };
        let mut said = Vec::new();
        let both = [any(":1"), any(":2")];
        let resolved = resolve_all(&both).unwrap();
        let bound = bind_each(&both, &resolved, without_ipv6, |note| {
            said.push(note);
        });
        assert_eq!(bound.unwrap(), ["0.0.0.0:1", "0.0.0.0:2"]);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("IPv4 alone"), "{said:?}");
        // Who asks for an IPv6 address gets that or nothing.
        let explicit = [any("[::]:3")];
        let resolved = resolve_all(&explicit).unwrap();
        let error = bind_each(&explicit, &resolved, without_ipv6, |_| {}).unwrap_err();
        assert!(error.to_string().contains("[::]:3"), "{error}");
    }

    #[test]
    fn a_host_without_ipv6_is_told_from_a_wrong_address() {
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
