//! Addresses as the old programs take them: with names of hosts, without a host, and wildcards that mean
//! both families.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::model::{InstanceName, Protocol, ValueError};

/// Where to listen or connect, as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An address.
    Addr(SocketAddr),
    /// The name of a host, to be looked up when the relay starts.
    Name {
        /// The host.
        host: String,
        /// The port.
        port: u16,
    },
}

impl Place {
    /// `a.b.c.d:port`, `[v6]:port`, `name:port`, or `:port` for every address.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let wrong = || {
            ValueError::new(
                format!("'{text}' is not an address with a port"),
                "an address and a port such as 127.0.0.1:443 or [::1]:443",
            )
        };
        if let Ok(addr) = text.parse() {
            return Self::with_port(addr).ok_or_else(wrong);
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port: u16 = port.parse().ok().filter(|_| digits).ok_or_else(wrong)?;
        if host.is_empty() {
            let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
            return Self::with_port(any).ok_or_else(wrong);
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        // 1.2.3 and 300.1.1.1 are mistyped addresses rather than names
        let is_number = host.chars().all(|c| c.is_ascii_digit() || c == '.');
        if port == 0 || is_number || !host.chars().all(is_name) {
            return Err(wrong());
        }
        Ok(Self::Name {
            host: host.to_owned(),
            port,
        })
    }

    fn with_port(addr: SocketAddr) -> Option<Self> {
        (addr.port() != 0).then_some(Self::Addr(addr))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// The addresses that Go listens on where it is told this one: a wildcard of either family is both.
pub fn places(listen: SocketAddr, has_ipv6: bool) -> Vec<SocketAddr> {
    let port = listen.port();
    if !listen.ip().is_unspecified() {
        return vec![listen];
    }
    let mut all = vec![SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)];
    if has_ipv6 {
        all.push(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port));
    }
    all
}

/// What a relay without a line in instances.tsv is called: `tcp-100.64.0.1-2222`.
///
/// # Errors
/// Never for an address with a port.
pub fn relay_name(protocol: Protocol, listen: SocketAddr) -> Result<InstanceName, ValueError> {
    let ip = match listen.ip() {
        IpAddr::V6(ip) if ip.is_unspecified() => "any6".to_owned(),
        ip => ip.to_string().replace(':', "-"),
    };
    format!("{protocol}-{ip}-{}", listen.port()).parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_place() {
        for (text, shown) in [
            ("127.0.0.1:443", "127.0.0.1:443"),
            ("[::1]:443", "[::1]:443"),
            (":8443", "0.0.0.0:8443"),
            ("localhost:22", "localhost:22"),
            ("web-1.example.org:80", "web-1.example.org:80"),
        ] {
            assert_eq!(Place::parse(text).unwrap().to_string(), shown);
        }
        for bad in [
            "",
            ":",
            "8443",
            "127.0.0.1",
            "::1:443",
            "127.0.0.1:",
            "127.0.0.1:0",
            "1.2.3:80",
            "300.1.1.1:80",
            "a b:80",
            "host:http",
            "host:70000",
            "host:+1",
            "[::1]",
            "[::1:443",
        ] {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_relays_are_instance_names() {
        for (listen, name) in [
            ("100.64.0.1:2222", "tcp-100.64.0.1-2222"),
            ("[fd00::1]:2222", "tcp-fd00--1-2222"),
            ("[::]:80", "tcp-any6-80"),
        ] {
            let listen = listen.parse().unwrap();
            assert_eq!(relay_name(Protocol::Tcp, listen).unwrap().as_str(), name);
        }
    }

    #[test]
    fn a_wildcard_is_both_families() {
        let all = |text: &str, has_ipv6| places(text.parse().unwrap(), has_ipv6).len();
        assert_eq!(all("0.0.0.0:1", true), 2);
        assert_eq!(all("[::]:1", true), 2);
        assert_eq!(all("0.0.0.0:1", false), 1);
        assert_eq!(all("127.0.0.1:1", true), 1);
    }
}
