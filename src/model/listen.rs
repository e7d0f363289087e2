//! Where an instance accepts: an address and a port, a range of ports, a routed network, or a Unix socket's
//! path.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::network::of_address;
use super::{ListenAddr, ListenNetwork, ValueError};

/// Where an instance accepts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Listen {
    /// One address and port.
    Address(ListenAddr),
    /// Every port of a range, of one address.
    Range(ListenRange),
    /// Whatever is routed to this host for these addresses and ports, by one socket for all of them.
    Network(ListenNetwork),
    /// A Unix stream socket, for a proxy on the same host.
    Unix(SocketPath),
}

impl Listen {
    const EXPECTED: &str = "an address and a port such as 100.64.0.1:2222 or [fd00::1]:2222, a range of \
        ports such as 100.64.0.1:10000-10999, or a Unix socket such as unix:/run/mmproxy/web.sock";

    /// The address and its ports, first and last, of a network the first address; none of a Unix socket.
    pub fn ports(&self) -> Option<ListenRange> {
        match self {
            Self::Address(addr) => Some(ListenRange {
                ip: addr.get(),
                last: addr.get().port(),
            }),
            Self::Range(range) => Some(*range),
            Self::Network(all) => Some(ListenRange::new(all.network().addr(), all.ports())),
            Self::Unix(_) => None,
        }
    }

    /// Whether a place is one of these.
    pub fn has(&self, endpoint: &Endpoint) -> bool {
        match (self, endpoint) {
            (Self::Unix(path), Endpoint::Unix(other)) => path == other,
            (Self::Network(all), Endpoint::Transparent(addr)) => all.socket() == *addr,
            (Self::Address(_) | Self::Range(_), Endpoint::Inet(addr)) => {
                self.ports().is_some_and(|range| {
                    let mut first = *addr;
                    first.set_port(range.first().port());
                    let ports = range.first().port()..=range.last();
                    first == range.first() && ports.contains(&addr.port())
                })
            }
            _ => false,
        }
    }

    /// Each place that has a socket of its own.
    pub fn endpoints(&self) -> impl Iterator<Item = Endpoint> + use<> {
        let (ports, single) = match self {
            Self::Unix(path) => (None, Some(Endpoint::Unix(path.clone()))),
            Self::Network(all) => (None, Some(Endpoint::Transparent(all.socket()))),
            Self::Address(_) | Self::Range(_) => (self.ports(), None),
        };
        let inet = ports.into_iter().flat_map(ListenRange::addrs);
        inet.map(Endpoint::Inet).chain(single)
    }

    /// The same for `listen=transparent`: for what is routed here, whether the address is this host's or not.
    ///
    /// # Errors
    /// Where nothing is ever routed there.
    pub fn transparent(self) -> Result<Self, ValueError> {
        match (&self, self.ports()) {
            (Self::Address(_) | Self::Range(_), Some(range)) => {
                of_address(range.first(), range.ports()).map(Self::Network)
            }
            (Self::Unix(_), _) => Err(ValueError::new(
                format!("nothing is routed to a Unix socket, {self}"),
                "an address or a network, and a port",
            )),
            _ => Ok(self),
        }
    }
}

impl From<ListenAddr> for Listen {
    fn from(addr: ListenAddr) -> Self {
        Self::Address(addr)
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(f),
            Self::Range(range) => range.fmt(f),
            Self::Network(all) => all.fmt(f),
            Self::Unix(path) => path.fmt(f),
        }
    }
}

impl Serialize for Listen {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl FromStr for Listen {
    type Err = ValueError;

    /// As [`ListenAddr`] reads it, with `first-last` for the port, as [`ListenNetwork`] where there is a `/`,
    /// or `unix:/path`.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return path.parse().map(Self::Unix);
        }
        if text.contains('/') {
            return text.parse().map(Self::Network);
        }
        let (before, port) = text.rsplit_once(':').unwrap_or(("", text));
        let wrong = |problem: String| Err(ValueError::new(problem, Self::EXPECTED));
        match port.split_once('-') {
            None => match text.parse() {
                Ok(addr) => Ok(Self::Address(addr)),
                Err(mistake) => wrong(mistake.problem),
            },
            Some(_) => {
                let ports: PortRange = match port.parse() {
                    Ok(ports) => ports,
                    Err(ValueError { problem, .. }) => return wrong(problem),
                };
                match format!("{before}:{}", ports.first()).parse::<ListenAddr>() {
                    Ok(addr) if ports.first() == ports.last() => Ok(Self::Address(addr)),
                    Ok(addr) => Ok(Self::Range(ListenRange {
                        ip: addr.get(),
                        last: ports.last(),
                    })),
                    Err(_) => wrong(format!("'{text}' is not a listen address")),
                }
            }
        }
    }
}

/// Ports from a first to a last one, both included; never port 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The range, or `None` where it begins at 0 or ends before it begins.
    pub fn new(first: u16, last: u16) -> Option<Self> {
        (first != 0 && first <= last).then_some(Self { first, last })
    }

    /// The first port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// The last port.
    pub fn last(self) -> u16 {
        self.last
    }

    /// Whether a port is one of them.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// How many ports; at least one.
    pub fn count(self) -> u32 {
        u32::from(self.last - self.first) + 1
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.first.fmt(f)?;
        if self.last != self.first {
            write!(f, "-{}", self.last)?;
        }
        Ok(())
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl FromStr for PortRange {
    type Err = ValueError;

    /// `port` or `first-last`.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        const EXPECTED: &str =
            "a port from 1 to 65535, or a range such as 10000-10999, the smaller one first";
        let port = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u16>().ok().filter(|port| digits && *port != 0)
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (port(first), port(last)) {
            (Some(first), Some(last)) => Self::new(first, last).ok_or_else(|| {
                ValueError::new(
                    format!("the range of ports {text} ends before it begins"),
                    EXPECTED,
                )
            }),
            _ if text.contains('-') && text != "-" => Err(ValueError::new(
                format!("'{text}' is not a range of ports"),
                EXPECTED,
            )),
            _ => Err(ValueError::new(format!("'{text}' is not a port"), EXPECTED)),
        }
    }
}

/// An address and a range of its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenRange {
    /// With the first port, and the scope of a link-local address.
    ip: SocketAddr,
    last: u16,
}

impl ListenRange {
    /// These ports of an address.
    pub fn new(ip: IpAddr, ports: PortRange) -> Self {
        Self {
            ip: SocketAddr::new(ip, ports.first),
            last: ports.last,
        }
    }

    /// The address.
    pub fn ip(self) -> IpAddr {
        self.ip.ip()
    }

    /// The address with the first port.
    pub fn first(self) -> SocketAddr {
        self.ip
    }

    /// The last port.
    pub fn last(self) -> u16 {
        self.last
    }

    /// The ports.
    pub fn ports(self) -> PortRange {
        PortRange {
            first: self.ip.port(),
            last: self.last,
        }
    }

    /// Each address and port.
    pub fn addrs(self) -> impl Iterator<Item = SocketAddr> {
        (self.ip.port()..=self.last).map(move |port| {
            let mut addr = self.ip;
            addr.set_port(port);
            addr
        })
    }
}

impl fmt::Display for ListenRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip.fmt(f)?;
        if self.last != self.ip.port() {
            write!(f, "-{}", self.last)?;
        }
        Ok(())
    }
}

/// The path of a Unix socket: absolute, and short enough for the kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketPath(Arc<Path>);

impl SocketPath {
    /// The longest path in bytes (`sun_path` without the zero behind it).
    pub const MAX_LEN: usize = 107;

    /// The path.
    pub fn get(&self) -> &Path {
        &self.0
    }

    /// Takes a path that a socket is bound to.
    pub fn bound(path: PathBuf) -> Self {
        Self(path.into())
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

impl FromStr for SocketPath {
    type Err = ValueError;

    /// The path without `unix:`.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let wrong = |problem: String| {
            Err(ValueError::new(
                problem,
                format!(
                    "unix: and an absolute path of at most {} bytes such as unix:/run/mmproxy/web.sock",
                    Self::MAX_LEN
                ),
            ))
        };
        if text.starts_with('@') {
            // it has no file, hence no permissions: any local user could claim to be any client
            return wrong(format!(
                "'unix:{text}' is an abstract socket, which everyone on this host may open"
            ));
        }
        if !text.starts_with('/') {
            return wrong(format!("'unix:{text}' is not an absolute path"));
        }
        if text.ends_with('/') {
            return wrong(format!("'unix:{text}' is a directory"));
        }
        if text.len() > Self::MAX_LEN {
            return wrong(format!("'unix:{text}' is {} bytes long", text.len()));
        }
        Ok(Self(Path::new(text).into()))
    }
}

/// One place where a socket listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// An address and a port.
    Inet(SocketAddr),
    /// An address and a port that need not be this host's, of a socket that others can be handed to.
    Transparent(SocketAddr),
    /// A Unix socket.
    Unix(SocketPath),
}

impl Endpoint {
    /// The port; 0 of a Unix socket.
    pub fn port(&self) -> u16 {
        match self {
            Self::Inet(addr) | Self::Transparent(addr) => addr.port(),
            Self::Unix(_) => 0,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(addr) | Self::Transparent(addr) => addr.fmt(f),
            Self::Unix(path) => path.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_that_are_read_come_out_again() {
        for text in [
            "100.64.0.1:2222",
            "100.64.0.1:10000-10999",
            "[fd00::1]:10000-10999",
            "[fe80::1%3]:1-2",
            "0.0.0.0:1-65535",
            "unix:/run/mmproxy/web.sock",
        ] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        assert_eq!(":5-6".parse::<Listen>().unwrap().to_string(), "0.0.0.0:5-6");
        assert_eq!(
            "10.0.0.1:5-5".parse::<Listen>().unwrap().to_string(),
            "10.0.0.1:5"
        );
    }

    #[test]
    fn what_is_no_place_to_listen() {
        let long = format!("unix:/{}", "a".repeat(SocketPath::MAX_LEN));
        for (text, problem) in [
            (
                "10.0.0.1:9-8",
                "the range of ports 9-8 ends before it begins",
            ),
            ("10.0.0.1:0-8", "'0-8' is not a range of ports"),
            ("10.0.0.1:1-65536", "'1-65536' is not a range of ports"),
            ("10.0.0.1:1-2-3", "'1-2-3' is not a range of ports"),
            ("10.0.0.1:-", "'-' is not a port"),
            ("10.0.0.1:+1-3", "'+1-3' is not a range of ports"),
            ("nobody:1-3", "'nobody:1-3' is not a listen address"),
            (
                "unix:run/x.sock",
                "'unix:run/x.sock' is not an absolute path",
            ),
            ("unix:", "'unix:' is not an absolute path"),
            ("unix:/run/", "'unix:/run/' is a directory"),
            (
                "unix:@x",
                "'unix:@x' is an abstract socket, which everyone on this host may open",
            ),
            (&*long, &*format!("'{long}' is 108 bytes long")),
        ] {
            assert_eq!(text.parse::<Listen>().unwrap_err().problem, problem);
        }
    }

    #[test]
    fn each_port_is_an_endpoint() {
        let listen: Listen = "10.0.0.1:65534-65535".parse().unwrap();
        let endpoints: Vec<_> = listen.endpoints().map(|one| one.to_string()).collect();
        assert_eq!(endpoints, ["10.0.0.1:65534", "10.0.0.1:65535"]);
        let listen: Listen = "unix:/x".parse().unwrap();
        let endpoints: Vec<_> = listen.endpoints().map(|one| one.to_string()).collect();
        assert_eq!(endpoints, ["unix:/x"]);
    }
}
