//! Addresses by the part they play, so that two of them cannot be swapped.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::ValueError;

/// An address family, as `AF_INET` and `AF_INET6` in `socket(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address as it stands (`::ffff:a.b.c.d` is IPv6 here; unmap first).
    pub fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Turns `::ffff:a.b.c.d` into `a.b.c.d`, and drops flow label and scope of what stays IPv6.
fn unmapped(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

macro_rules! role {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(SocketAddr);

        impl $name {
            /// Takes an address for this part; `::ffff:a.b.c.d` becomes `a.b.c.d`.
            pub fn new(addr: SocketAddr) -> Self {
                Self(unmapped(addr))
            }

            /// The socket address, never IPv4-mapped.
            pub fn get(self) -> SocketAddr {
                self.0
            }

            /// The address without the port.
            pub fn ip(self) -> IpAddr {
                self.0.ip()
            }

            /// The port in host order.
            pub fn port(self) -> u16 {
                self.0.port()
            }

            /// The family after unmapping.
            pub fn family(self) -> Family {
                Family::of(self.0.ip())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(&self.0)
            }
        }
    };
}

role! {
    /// The address in the PROXY header: who the service shall see.
    ClientAddr
}
role! {
    /// The local service that a connection is passed on to.
    TargetAddr
}

/// The peer of an accepted connection: the trusted sender of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProxyAddr {
    /// By its address, never IPv4-mapped.
    Inet(SocketAddr),
    /// A process of this host behind a Unix socket, by its pid; 0 where the kernel does not tell.
    Local(u32),
}

impl ProxyAddr {
    /// Takes an address for this part; `::ffff:a.b.c.d` becomes `a.b.c.d`.
    pub fn new(addr: SocketAddr) -> Self {
        Self::Inet(unmapped(addr))
    }

    /// The socket address; none of a process behind a Unix socket.
    pub fn addr(self) -> Option<SocketAddr> {
        match self {
            Self::Inet(addr) => Some(addr),
            Self::Local(_) => None,
        }
    }

    /// The address without the port, which for a process of this host is 127.0.0.1: to count by, and
    /// never to compare with an allow list.
    pub fn ip(self) -> IpAddr {
        match self {
            Self::Inet(addr) => addr.ip(),
            Self::Local(_) => Ipv4Addr::LOCALHOST.into(),
        }
    }
}

/// `100.64.0.1:4000`, or `unix:` and the pid.
impl fmt::Display for ProxyAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(addr) => addr.fmt(f),
            Self::Local(pid) => write!(f, "unix:{pid}"),
        }
    }
}

impl FromStr for ProxyAddr {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let parsed = match text.strip_prefix("unix:") {
            Some(pid) => pid.parse().ok().map(Self::Local),
            None => text.parse().ok().map(Self::new),
        };
        parsed.ok_or_else(|| {
            ValueError::new(
                format!("'{text}' is no proxy"),
                "an address and a port, or unix: and a pid",
            )
        })
    }
}

impl Serialize for ProxyAddr {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ProxyAddr {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(from)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// Where an instance accepts connections. An IPv6 wildcard listens on IPv6 only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenAddr(SocketAddr);

impl ListenAddr {
    /// Takes an address as it stands; port 0 asks the kernel for a free one.
    pub fn new(addr: SocketAddr) -> Self {
        Self(addr)
    }

    /// The socket address.
    pub fn get(self) -> SocketAddr {
        self.0
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for ListenAddr {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

impl FromStr for ListenAddr {
    type Err = ValueError;

    /// `a.b.c.d:port`, `[v6]:port`, `[fe80::1%3]:port`, or `:port` for every IPv4 address (Go's form).
    fn from_str(text: &str) -> Result<Self, ValueError> {
        const EXPECTED: &str = "an address and a port such as 100.64.0.1:2222 or [fd00::1]:2222";
        let parsed = match text.strip_prefix(':') {
            Some(port) => port
                .parse()
                .ok()
                .map(|port| SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))),
            None => text
                .parse::<SocketAddrV4>()
                .map(SocketAddr::V4)
                .or_else(|_| text.parse::<SocketAddrV6>().map(SocketAddr::V6))
                .ok(),
        };
        let addr = parsed.ok_or_else(|| {
            ValueError::new(format!("'{text}' is not a listen address"), EXPECTED)
        })?;
        match unbindable(addr) {
            Some(why) => Err(ValueError::new(
                format!("listen address '{text}' {why}"),
                EXPECTED,
            )),
            None => Ok(Self(addr)),
        }
    }
}

/// Why `bind(2)` would refuse a listen address, or not mean what was written; none when it is fine.
fn unbindable(addr: SocketAddr) -> Option<&'static str> {
    match addr {
        _ if addr.port() == 0 => Some("has port 0"),
        _ if addr.ip().is_multicast() => Some("is multicast"),
        SocketAddr::V4(v4) if v4.ip().is_broadcast() => Some("is broadcast"),
        // IPV6_V6ONLY is on: such a bind fails with EINVAL
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
            Some("is an IPv4 address in IPv6 form")
        }
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() && v6.scope_id() == 0 => {
            Some("is link-local without its interface's number (%N)")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_become_ipv4() {
        let client = ClientAddr::new("[::ffff:192.0.2.7]:80".parse().unwrap());
        assert_eq!(client.to_string(), "192.0.2.7:80");
        assert_eq!(client.family(), Family::V4);
    }

    #[test]
    fn proxies_come_out_as_they_were() {
        for text in ["10.0.0.2:5555", "[fd00::2]:1", "unix:4711"] {
            assert_eq!(text.parse::<ProxyAddr>().unwrap().to_string(), text);
        }
        assert!("unix:me".parse::<ProxyAddr>().is_err());
    }

    #[test]
    fn listen_forms() {
        assert_eq!(
            "127.0.0.1:22".parse::<ListenAddr>().unwrap().to_string(),
            "127.0.0.1:22"
        );
        assert_eq!(
            "[::1]:22".parse::<ListenAddr>().unwrap().to_string(),
            "[::1]:22"
        );
        assert_eq!(
            ":22".parse::<ListenAddr>().unwrap().to_string(),
            "0.0.0.0:22"
        );
        for bad in [
            "",
            ":",
            "::1:22",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:0",
            "a:1",
            "1.2.3.4:65536",
            "224.0.0.1:22",
            "255.255.255.255:22",
            "[::ffff:1.2.3.4]:22",
            "[fe80::1]:22",
            "[ff02::1]:22",
        ] {
            assert!(bad.parse::<ListenAddr>().is_err(), "{bad}");
        }
    }
}
