//! `--web.listen-address`: what was typed, and the socket address that it is
//! once names and interfaces are looked up.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, ToSocketAddrs};

use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use crate::ConfigError;

/// One `--web.listen-address`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddress {
    /// As typed, for messages.
    pub text: String,
    /// Where it was written.
    pub origin: String,
    /// Host part.
    pub host: ListenHost,
    /// Port; 0 takes any free one.
    pub port: u16,
}

/// The host part of a listen address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenHost {
    /// Empty: `[::]`, dual stack; IPv4 alone where IPv6 is off.
    Any,
    /// An address.
    Ip(IpAddr),
    /// An IPv6 address with the name or the index of an interface.
    Zone(Ipv6Addr, String),
    /// A host name.
    Name(String),
}

/// A listen address as Go writes it: `:19910`, `127.0.0.1:19910`,
/// `[::1]:19910`, `[fe80::1%eth0]:19910`, `name:19910`. Port 0 takes any free
/// port. Names and interfaces are looked up later
/// ([`ListenAddress::resolve`]).
pub fn parse(text: &str) -> Result<(ListenHost, u16), String> {
    let bad = |why: &str| format!("bad address {text:?}: {why}");
    let (host, port) = text.rsplit_once(':').ok_or_else(|| {
        bad("a port is missing; write it like :19910, 127.0.0.1:19910 or [::1]:19910")
    })?;
    let bad_port = || bad("the port must be a number from 0 to 65535");
    // `u16::from_str` takes a leading plus.
    if port.starts_with('+') {
        return Err(bad_port());
    }
    let port = port.parse().map_err(|_| bad_port())?;
    let host = listen_host(host).map_err(|why| bad(&why))?;
    Ok((host, port))
}

fn listen_host(host: &str) -> Result<ListenHost, String> {
    if host.is_empty() {
        return Ok(ListenHost::Any);
    }
    if let Some(inner) = host.strip_prefix('[') {
        return ipv6_host(inner);
    }
    if host.contains(':') {
        return Err("an IPv6 address must stand in brackets, like [::1]:19910".to_owned());
    }
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(ListenHost::Ip(ip));
    }
    if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err("the host is no IPv4 address".to_owned());
    }
    // RFC 1123, and the underscore that resolvers accept.
    let is_in_names = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c) || !c.is_ascii();
    let label = |label: &str| (1..=63).contains(&label.len());
    let labels = host.strip_suffix('.').unwrap_or(host);
    if host.len() > 254 || !host.chars().all(is_in_names) || !labels.split('.').all(label) {
        return Err("the host is neither an IP address nor a host name".to_owned());
    }
    Ok(ListenHost::Name(host.to_owned()))
}

/// What stands behind the opening bracket.
fn ipv6_host(inner: &str) -> Result<ListenHost, String> {
    let bad = || "the part in brackets is no IPv6 address".to_owned();
    let inner = inner.strip_suffix(']').ok_or_else(bad)?;
    let (address, zone) = match inner.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (inner, None),
    };
    let address: Ipv6Addr = address.parse().map_err(|_| bad())?;
    match zone {
        // `inet6_bind` refuses it without an interface.
        None | Some("0") if address.is_unicast_link_local() => Err(format!(
            "a link-local address needs an interface; write it like [{address}%eth0]"
        )),
        None => Ok(ListenHost::Ip(address.into())),
        Some(zone) if is_interface_name(zone) => Ok(ListenHost::Zone(address, zone.to_owned())),
        Some(zone) => Err(format!("no interface can be called {zone:?}")),
    }
}

/// `dev_valid_name` (net/core/dev.c).
fn is_interface_name(name: &str) -> bool {
    let forbidden = |c: char| c == '/' || c == ':' || c.is_ascii_whitespace();
    !matches!(name, "" | "." | "..") && name.len() < 16 && !name.contains(forbidden)
}

impl ListenAddress {
    /// The address to bind. Names and interfaces may not exist yet.
    ///
    /// # Errors
    /// A [`ConfigError`] that [is not yet](ConfigError::is_not_yet) true.
    pub fn resolve(&self) -> Result<SocketAddr, ConfigError> {
        let not_yet = |why: String| {
            let problem = format!("bad address {:?}: {why}", self.text);
            ConfigError::at(&self.origin, problem).not_yet()
        };
        match &self.host {
            ListenHost::Any => Ok((Ipv6Addr::UNSPECIFIED, self.port).into()),
            ListenHost::Ip(ip) => Ok((*ip, self.port).into()),
            ListenHost::Zone(ip, zone) => {
                let index = interface(zone).map_err(|error| {
                    not_yet(format!("this host has no interface {zone:?} ({error})"))
                })?;
                // Addresses of a wider scope are bound without one.
                let index = if ip.is_unicast_link_local() { index } else { 0 };
                Ok(SocketAddrV6::new(*ip, self.port, 0, index).into())
            }
            ListenHost::Name(name) => {
                let addresses: Vec<SocketAddr> = (name.as_str(), self.port)
                    .to_socket_addrs()
                    .map_err(|error| not_yet(format!("the host does not resolve: {error}")))?
                    .collect();
                let ipv4 = addresses.iter().find(|address| address.is_ipv4());
                ipv4.or(addresses.first())
                    .copied()
                    .ok_or_else(|| not_yet("the host has no address".to_owned()))
            }
        }
    }
}

/// Index of an interface that exists, by its name or else by its index, as
/// Go's `net` reads a zone.
fn interface(zone: &str) -> rustix::io::Result<u32> {
    let any = socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    netdevice::name_to_index(&any, zone).or_else(|error| {
        let index = zone.parse().map_err(|_| error)?;
        netdevice::index_to_name(&any, index).map(|_| index)
    })
}

/// The addresses to bind, in order.
///
/// # Errors
/// The first that cannot be resolved or overlaps an earlier one.
pub fn resolve_all(addresses: &[ListenAddress]) -> Result<Vec<SocketAddr>, ConfigError> {
    resolve_each(addresses.iter())
}

/// Refuses two addresses that would need one port, as far as the text alone
/// shows.
///
/// # Errors
/// The second of the two.
pub fn check_literal(addresses: &[ListenAddress]) -> Result<(), ConfigError> {
    let literal = |it: &&ListenAddress| matches!(it.host, ListenHost::Any | ListenHost::Ip(_));
    resolve_each(addresses.iter().filter(literal)).map(drop)
}

fn resolve_each<'a>(
    addresses: impl Iterator<Item = &'a ListenAddress>,
) -> Result<Vec<SocketAddr>, ConfigError> {
    let mut resolved: Vec<(&ListenAddress, SocketAddr)> = Vec::new();
    for new in addresses {
        let address = new.resolve()?;
        if let Some((old, _)) = resolved.iter().find(|(_, old)| overlap(*old, address)) {
            let (old, text) = (&old.text, &new.text);
            let problem = if old == text {
                format!("duplicate address {text:?}; remove one of the two")
            } else {
                format!("address {text:?} overlaps {old:?}; remove one of the two")
            };
            return Err(ConfigError::at(&new.origin, problem));
        }
        resolved.push((new, address));
    }
    Ok(resolved.into_iter().map(|(_, address)| address).collect())
}

/// Whether the kernel would refuse the second of the two: one port, and one
/// address or an address that covers the other. `[::]` is bound dual stack.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let ipv4 = |address: SocketAddr| address.ip().to_canonical().is_ipv4();
    let covers = |all: SocketAddr, one: SocketAddr| {
        all.ip().is_unspecified() && (all.is_ipv6() || ipv4(one))
    };
    // Link-local addresses of two interfaces are two; see their scope.
    let same = a == b || ipv4(a) && a.ip().to_canonical() == b.ip().to_canonical();
    a.port() != 0 && a.port() == b.port() && (same || covers(a, b) || covers(b, a))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_are_go_ones() {
        let ip = |text: &str| ListenHost::Ip(text.parse().unwrap());
        let zone = |zone: &str| ListenHost::Zone("fe80::1".parse().unwrap(), zone.to_owned());
        let name = |name: &str| ListenHost::Name(name.to_owned());
        for (text, host, port) in [
            (":19910", ListenHost::Any, 19_910),
            ("127.0.0.1:0", ip("127.0.0.1"), 0),
            ("[::1]:9100", ip("::1"), 9100),
            ("0.0.0.0:80", ip("0.0.0.0"), 80),
            ("[fe80::1%eth0]:80", zone("eth0"), 80),
            ("[fe80::1%2]:80", zone("2"), 80),
            ("[fe80::1%enp0s31f6.4000]:80", zone("enp0s31f6.4000"), 80),
            ("localhost:80", name("localhost"), 80),
            ("db-1.internal.:80", name("db-1.internal."), 80),
        ] {
            assert_eq!(parse(text), Ok((host, port)), "{text}");
        }
        for text in [
            "19910",
            "",
            ":",
            ":http",
            ":65536",
            ":-1",
            "::1:9100",
            "[::1]",
            "[]:80",
            "[1.2.3.4]:80",
            "300.1.1.1:80",
            "[::1:80",
            "1.2.3:80",
            "[fe80::1]:80",
            "[fe80::1%0]:80",
            "[fe80::1%]:80",
            "[fe80::1%eth/0]:80",
            "[fe80::1%no interface]:80",
            "[fe80::1%sixteen-letters-]:80",
            "[localhost]:80",
            "http://localhost:80",
            "two words:80",
            "a..b:80",
            ".:80",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        let error = parse("[fe80::1]:80").unwrap_err();
        assert!(error.contains("like [fe80::1%eth0]"), "{error}");
    }

    fn listen(text: &str) -> ListenAddress {
        let (host, port) = parse(text).unwrap();
        ListenAddress {
            text: text.to_owned(),
            origin: "CONNMON_WEB_LISTEN_ADDRESS".to_owned(),
            host,
            port,
        }
    }

    #[test]
    fn zones_are_interfaces_by_name_or_index() {
        for text in ["[fe80::1%lo]:80", "[fe80::1%1]:80"] {
            let address = listen(text).resolve().unwrap();
            assert_eq!(address.to_string(), "[fe80::1%1]:80", "{text}");
        }
        assert_eq!(
            listen("[::1%lo]:80").resolve().unwrap(),
            listen("[::1]:80").resolve().unwrap()
        );
    }

    #[test]
    fn what_does_not_exist_yet_is_not_wrong() {
        for (text, why) in [
            ("[fe80::1%connmon-none]:80", "no interface \"connmon-none\""),
            ("[fe80::1%4000000000]:80", "no interface \"4000000000\""),
            ("no-such-host.invalid:80", "the host does not resolve"),
        ] {
            let error = listen(text).resolve().unwrap_err();
            assert!(error.is_not_yet(), "{error}");
            let message = error.to_string();
            assert!(
                message.starts_with("CONNMON_WEB_LISTEN_ADDRESS: bad address"),
                "{message}"
            );
            assert!(message.contains(text) && message.contains(why), "{message}");
        }
    }

    #[test]
    fn overlaps_are_found_once_names_are_resolved() {
        let both = |first, second| resolve_all(&[listen(first), listen(second)]);
        for (first, second) in [
            ("localhost:9", "127.0.0.1:9"),
            (":9", "localhost:9"),
            ("[fe80::1%lo]:9", "[fe80::1%1]:9"),
            ("[::1%lo]:9", "[::1]:9"),
        ] {
            let error = both(first, second).unwrap_err();
            assert!(error.to_string().contains(second), "{error}");
            assert!(!error.is_not_yet(), "{error}");
        }
        assert_eq!(both("[fe80::1%lo]:9", "[::1]:9").unwrap().len(), 2);
        // Nothing is looked up for this.
        let unknown = [listen("no-such-host.invalid:9"), listen(":9"), listen(":9")];
        let error = check_literal(&unknown).unwrap_err();
        assert!(error.to_string().contains("duplicate address"), "{error}");
    }
}
