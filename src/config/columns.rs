//! The columns of instances.tsv as serde reads them: each cell becomes a value or its mistake, so that
//! one bad cell does not hide the next.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};

use crate::model::{InstanceName, Listen, Mark, PortRange, TargetName, ValueError};

/// The names of the columns, in their order.
pub(super) const NAMES: [&str; 7] = [
    "name",
    "fwmark",
    "listen_addr",
    "target_ipv4",
    "target_port",
    "target_ipv6",
    "options",
];
pub(super) const NAME: usize = 0;
pub(super) const FWMARK: usize = 1;
pub(super) const LISTEN: usize = 2;
pub(super) const TARGET4: usize = 3;
pub(super) const PORT: usize = 4;
pub(super) const TARGET6: usize = 5;
pub(super) const OPTIONS: usize = 6;
/// How many there must be: all but the options.
pub(super) const REQUIRED: usize = OPTIONS;

/// What may stand in an empty column's place, by column.
pub(super) const EXPECTED: [&str; 7] = [
    "a name such as vps01-ssh",
    "the mark of a pathway, as in pathways.conf",
    "an address and a port such as 100.64.0.1:2222, or unix:/run/mmproxy/web.sock",
    "an IPv4 address such as 127.0.0.1, a name, docker:NAME, or - where IPv4 is not served",
    "a port from 1 to 65535, or a range such as 10000-10999",
    "an IPv6 address such as ::1, a name, docker:NAME, or - where IPv6 is not served",
    "key=value words",
];

/// A line. A column is `None` where its cell is empty or not there.
#[derive(Debug, Deserialize)]
pub(super) struct Row {
    #[serde(default)]
    pub(super) name: Option<Tried<InstanceName>>,
    #[serde(default)]
    pub(super) fwmark: Option<Tried<Mark>>,
    #[serde(default)]
    pub(super) listen_addr: Option<Tried<Listen>>,
    #[serde(default)]
    pub(super) target_ipv4: Option<Tried<Target<Ipv4Addr>>>,
    #[serde(default)]
    pub(super) target_port: Option<Tried<PortRange>>,
    #[serde(default)]
    pub(super) target_ipv6: Option<Tried<Target<Ipv6Addr>>>,
}

/// What became of a cell. Reading one never fails.
#[derive(Debug)]
pub(super) struct Tried<T>(pub(super) Result<T, ValueError>);

impl<'de, T: FromStr<Err = ValueError>> Deserialize<'de> for Tried<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text<T>(std::marker::PhantomData<T>);
        impl<T: FromStr<Err = ValueError>> de::Visitor<'_> for Text<T> {
            type Value = Tried<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("text")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Tried<T>, E> {
                Ok(Tried(text.parse()))
            }
        }
        from.deserialize_str(Text(std::marker::PhantomData))
    }
}

/// A target's address or name, or `-`.
#[derive(Debug, Clone)]
pub(super) enum Target<A> {
    Served(A),
    Named(TargetName),
    NotServed,
}

impl FromStr for Target<Ipv4Addr> {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "-" {
            return Ok(Self::NotServed);
        }
        let wrong = |problem: String| Err(ValueError::new(problem, EXPECTED[TARGET4]));
        match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(addr)) => match unusable(IpAddr::V4(addr)) {
                Some(why) => wrong(format!("{addr} is no target: {why}")),
                None => Ok(Self::Served(addr)),
            },
            Ok(IpAddr::V6(addr)) => wrong(format!("{addr} is an IPv6 address in the IPv4 column")),
            Err(_) => named(text)
                .ok_or_else(|| ValueError::new(no_address(text, "IPv4"), EXPECTED[TARGET4])),
        }
    }
}

impl FromStr for Target<Ipv6Addr> {
    type Err = ValueError;

    /// The address bare, as the shell set-up has it, or in brackets.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "-" {
            return Ok(Self::NotServed);
        }
        let wrong = |problem: String| Err(ValueError::new(problem, EXPECTED[TARGET6]));
        let bare = text
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        match bare.unwrap_or(text).parse::<IpAddr>() {
            Ok(IpAddr::V6(addr)) => match unusable(IpAddr::V6(addr)) {
                Some(why) => wrong(format!("{addr} is no target: {why}")),
                None => Ok(Self::Served(addr)),
            },
            Ok(IpAddr::V4(addr)) => wrong(format!("{addr} is an IPv4 address in the IPv6 column")),
            Err(_) => named(text)
                .ok_or_else(|| ValueError::new(no_address(text, "IPv6"), EXPECTED[TARGET6])),
        }
    }
}

/// Why no service can be reached at an address; none when one can.
fn unusable(addr: IpAddr) -> Option<&'static str> {
    match addr {
        _ if addr.is_multicast() => Some("it is multicast"),
        IpAddr::V4(v4) if v4.is_unspecified() => Some(
            "it means every address of this host; name the one the service waits at, often 127.0.0.1",
        ),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("it is broadcast"),
        IpAddr::V6(v6) if v6.is_unspecified() => Some(
            "it means every address of this host; name the one the service waits at, often ::1",
        ),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Some("it is an IPv4 address in IPv6 form, which IPv6 clients cannot be passed on to")
        }
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Some("it is link-local, which means nothing without an interface")
        }
        _ => None,
    }
}

/// What is no address and may be a name.
fn named<A>(text: &str) -> Option<Target<A>> {
    text.parse().ok().map(Target::Named)
}

fn no_address(text: &str, family: &str) -> String {
    if text.starts_with("docker:") {
        return format!("'{text}' names no container");
    }
    if text.parse::<std::net::SocketAddr>().is_ok() {
        format!("'{text}' has a port, which belongs in column 5 (target_port)")
    } else if text.contains('/') {
        format!("'{text}' is a prefix, not an {family} address")
    } else if text.contains('%') {
        format!("'{text}' has a scope: link-local targets are not supported")
    } else {
        format!("'{text}' is neither an {family} address nor a name")
    }
}
