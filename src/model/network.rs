//! Addresses that a router hands to this host without their being its own: what a transparent listener
//! (`listen=transparent`, TPROXY) accepts.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Serialize, Serializer};

use super::{Family, ListenAddr, PortRange, Protocol, ValueError, parse_prefix};

/// The addresses of a network and ports of theirs, all heard by one socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenNetwork {
    /// Host bits cleared.
    network: IpNet,
    ports: PortRange,
}

impl ListenNetwork {
    const EXPECTED: &str = "the addresses that are routed to this host, with a port or a range, such as \
        203.0.113.0/24:443 or [2001:db8:5::]/64:10000-10999";

    /// These addresses, host bits cleared.
    pub fn new(network: IpNet, ports: PortRange) -> Self {
        Self {
            network: network.trunc(),
            ports,
        }
    }

    /// One address.
    pub fn single(ip: IpAddr, ports: PortRange) -> Self {
        Self {
            network: IpNet::from(ip),
            ports,
        }
    }

    /// The addresses.
    pub fn network(self) -> IpNet {
        self.network
    }

    /// The ports.
    pub fn ports(self) -> PortRange {
        self.ports
    }

    /// The family.
    pub fn family(self) -> Family {
        Family::of(self.network.addr())
    }

    /// What the one socket is bound to, and is told to the kernel's rules: the first address and port.
    pub fn socket(self) -> SocketAddr {
        SocketAddr::new(self.network.addr(), self.ports.first())
    }

    /// Whether it stands for every address: a wildcard socket takes whatever rules of somebody else's hand
    /// to it, and none of ours do.
    pub fn is_anywhere(self) -> bool {
        self.network.addr().is_unspecified()
    }

    /// Whether there is an address and port in both.
    pub fn overlaps(self, other: Self) -> bool {
        let (one, two) = (self.network, other.network);
        (one.contains(&two) || two.contains(&one))
            && self.ports.first() <= other.ports.last()
            && other.ports.first() <= self.ports.last()
    }
}

impl fmt::Display for ListenNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.network.addr() {
            IpAddr::V4(addr) => addr.fmt(f)?,
            IpAddr::V6(addr) => write!(f, "[{addr}]")?,
        }
        if self.network.prefix_len() != self.network.max_prefix_len() {
            write!(f, "/{}", self.network.prefix_len())?;
        }
        write!(f, ":{}", self.ports)
    }
}

impl Serialize for ListenNetwork {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl FromStr for ListenNetwork {
    type Err = ValueError;

    /// `a.b.c.d/len:ports` or `[v6]/len:ports`.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let wrong = |problem: String| ValueError::new(problem, Self::EXPECTED);
        let (before, ports) = text
            .rsplit_once(':')
            .filter(|(before, _)| before.contains('/'))
            .ok_or_else(|| wrong(format!("'{text}' has no port behind the network's length")))?;
        let ports: PortRange = ports
            .parse()
            .map_err(|ValueError { problem, .. }| wrong(problem))?;
        let (addr, length) = before.split_once('/').unwrap_or((before, ""));
        let bare = addr
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        if bare.is_none() && addr.contains(':') || bare.is_some_and(|bare| !bare.contains(':')) {
            return Err(wrong(format!("'{addr}' is no address of a network")));
        }
        let given = format!("{}/{length}", bare.unwrap_or(addr));
        let given = parse_prefix(&given).map_err(|mistake| wrong(mistake.problem))?;
        let network = given.trunc();
        if network != given {
            return Err(ValueError::new(
                format!("{given} has bits set behind its length"),
                Self { network, ports }.to_string(),
            ));
        }
        match unusable(network) {
            Some(why) => Err(wrong(format!("{network} {why}"))),
            None => Ok(Self { network, ports }),
        }
    }
}

/// Why nothing can be handed over for a network; none where it can.
fn unusable(network: IpNet) -> Option<&'static str> {
    let covers = |ip: IpAddr| network.contains(&ip);
    let addr = network.addr();
    let (loopback, multicast): (IpAddr, IpAddr) = match addr {
        IpAddr::V4(_) => ([127, 0, 0, 1].into(), [224, 0, 0, 1].into()),
        IpAddr::V6(_) => (
            [0, 0, 0, 0, 0, 0, 0, 1].into(),
            [0xff02, 0, 0, 0, 0, 0, 0, 1].into(),
        ),
    };
    match addr {
        _ if network.prefix_len() == 0 => {
            Some("is every address there is, this host's own services' too")
        }
        _ if covers(loopback) || addr.is_loopback() => {
            Some("covers loopback, which is never routed")
        }
        _ if covers(multicast) || addr.is_multicast() => Some("covers multicast"),
        _ if addr.is_unspecified() => Some("is no network that is routed"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Some("is link-local, which is never routed")
        }
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("is IPv4 in IPv6 form"),
        _ => None,
    }
}

/// What the kernel is to hand to a transparent listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Interception {
    /// The protocol.
    pub protocol: Protocol,
    /// What for, and where the listener is.
    pub listen: ListenNetwork,
}

impl fmt::Display for Interception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.protocol, self.listen)
    }
}

/// The single address of a plain listen address as a network.
///
/// # Errors
/// For one that is never routed.
pub(super) fn of_address(addr: SocketAddr, ports: PortRange) -> Result<ListenNetwork, ValueError> {
    let all = ListenNetwork::single(addr.ip(), ports);
    match unusable(all.network) {
        Some(why) if !all.is_anywhere() => Err(ValueError::new(
            format!("{} {why}", addr.ip()),
            format!(
                "{}, or {} for whatever rules of your own hand over",
                ListenNetwork::EXPECTED,
                ListenAddr::new(SocketAddr::from(([0, 0, 0, 0], ports.first())))
            ),
        )),
        _ => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_that_are_read_come_out_again() {
        for text in [
            "203.0.113.0/24:443",
            "203.0.113.0/24:10000-10999",
            "[2001:db8:5::]/64:443",
            "[2001:db8:5::]/64:1-65535",
        ] {
            assert_eq!(text.parse::<ListenNetwork>().unwrap().to_string(), text);
        }
        for (text, single) in [
            ("203.0.113.7/32:443", "203.0.113.7:443"),
            ("[2001:db8::7]/128:1-2", "[2001:db8::7]:1-2"),
        ] {
            assert_eq!(text.parse::<ListenNetwork>().unwrap().to_string(), single);
        }
    }

    #[test]
    fn what_is_no_network_to_listen_on() {
        for (text, problem) in [
            (
                "203.0.113.0/24",
                "'203.0.113.0/24' has no port behind the network's length",
            ),
            (
                "2001:db8::/64",
                "'2001:db8::/64' has no port behind the network's length",
            ),
            ("203.0.113.0/24:0", "'0' is not a port"),
            (
                "203.0.113.0/24:9-8",
                "the range of ports 9-8 ends before it begins",
            ),
            (
                "203.0.113.7/24:443",
                "203.0.113.7/24 has bits set behind its length",
            ),
            (
                "2001:db8::/64:443",
                "'2001:db8::' is no address of a network",
            ),
            (
                "[203.0.113.0]/24:443",
                "'[203.0.113.0]' is no address of a network",
            ),
            (
                "0.0.0.0/0:443",
                "0.0.0.0/0 is every address there is, this host's own services' too",
            ),
            (
                "[::]/0:443",
                "::/0 is every address there is, this host's own services' too",
            ),
            (
                "127.0.0.0/8:443",
                "127.0.0.0/8 covers loopback, which is never routed",
            ),
            (
                "0.0.0.0/1:443",
                "0.0.0.0/1 covers loopback, which is never routed",
            ),
            ("128.0.0.0/1:443", "128.0.0.0/1 covers multicast"),
            ("0.0.0.0/8:443", "0.0.0.0/8 is no network that is routed"),
            (
                "[fe80::]/64:443",
                "fe80::/64 is link-local, which is never routed",
            ),
        ] {
            let mistake = text.parse::<ListenNetwork>().expect_err(text);
            assert_eq!(mistake.problem, problem, "{text}");
        }
    }

    #[test]
    fn networks_meet_in_addresses_and_ports() {
        let of = |text: &str| text.parse::<ListenNetwork>().unwrap();
        let net = of("203.0.113.0/24:100-200");
        assert!(net.overlaps(of("203.0.113.0/25:200-300")));
        assert!(net.overlaps(of("203.0.0.0/16:1-100")));
        assert!(!net.overlaps(of("203.0.113.0/24:201")));
        assert!(!net.overlaps(of("203.0.114.0/24:100-200")));
        assert!(!net.overlaps(of("[2001:db8::]/64:100")));
    }
}
