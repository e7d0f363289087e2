//! An instance: one relay, as configured.

use std::fmt;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::str::FromStr;

use ipnet::IpNet;
use serde::Serialize;

use super::options::joined;
use super::{
    Answers, Family, InstanceOptions, Interception, Listen, Mark, NamedTargets, PortRange,
    TargetAddr, ValueError,
};

/// The name of an instance: `[A-Za-z0-9][A-Za-z0-9._-]*`, which systemd can carry as `mmproxy@NAME`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct InstanceName(String);

impl InstanceName {
    /// The longest name: it becomes part of file names and of a Unix socket's path.
    pub const MAX_LEN: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InstanceName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let valid = text.len() <= Self::MAX_LEN
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if valid {
            return Ok(Self(text.to_owned()));
        }
        Err(ValueError::new(
            format!("'{text}' is not an instance name"),
            format!(
                "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most {} of them",
                Self::MAX_LEN
            ),
        ))
    }
}

/// What an instance relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for Protocol {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(ValueError::new(
                format!("'{text}' is not a protocol"),
                "tcp or udp",
            )),
        }
    }
}

/// Which port of its target a connection goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TargetPorts {
    /// The target's one port, whichever port it came to.
    #[default]
    One,
    /// The port at the same place in the target's range as the one it came to in the listener's.
    Parallel,
}

/// One relay, as configured. At least one target is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Its name.
    pub name: InstanceName,
    /// The mark of its pathway. Always there in instances.tsv; a relay without files may do without, where
    /// routing of the host's own leads every reply from loopback back.
    pub mark: Option<Mark>,
    /// Where it accepts.
    pub listen: Listen,
    /// The target of IPv4 clients; of a range of ports the first.
    pub target4: Option<SocketAddrV4>,
    /// The target of IPv6 clients; of a range of ports the first.
    pub target6: Option<SocketAddrV6>,
    /// Which of the targets' ports a connection goes to.
    pub target_ports: TargetPorts,
    /// The targets that are names; their addresses are in `target4` and `target6` once they are known.
    #[serde(skip_serializing_if = "NamedTargets::is_empty")]
    pub named: NamedTargets,
    /// Everything else.
    pub options: InstanceOptions,
}

impl Instance {
    /// The targets with their ports as people write them, IPv4 first: names with the address they have.
    pub fn target_texts(&self) -> Vec<String> {
        let all = Family::BOTH.into_iter();
        all.filter_map(|family| self.target_of(family)).collect()
    }

    /// That for clients of one family, or `None` where it is not served.
    pub fn target_of(&self, family: Family) -> Option<String> {
        if let Some(prefixes) = &self.options.destinations {
            let of_family = |prefix: &&IpNet| Family::of(prefix.addr()) == family;
            let some: Vec<IpNet> = prefixes.iter().filter(of_family).copied().collect();
            return (!some.is_empty()).then(|| format!("header ({})", joined(&some)));
        }
        let target = self.target(family);
        let Some(name) = self.named.of(family) else {
            return target.map(|target| self.target_text(target));
        };
        Some(match target {
            Some(target) => format!("{name} ({})", self.target_text(target)),
            None => {
                let first = SocketAddr::from(([0, 0, 0, 0], self.named.port));
                match self.target_port_range(TargetAddr::new(first)) {
                    Some(ports) => format!("{name}:{ports}"),
                    None => name.to_string(),
                }
            }
        })
    }

    /// What the kernel is to hand to its listener; `None` of one that listens on addresses of this host's own,
    /// and of one that takes what rules of somebody else's hand to it.
    pub fn interception(&self) -> Option<Interception> {
        match self.listen {
            Listen::Network(listen) if !listen.is_anywhere() => Some(Interception {
                protocol: self.options.protocol,
                listen,
            }),
            _ => None,
        }
    }

    /// How a target with its ports is written.
    fn target_text(&self, target: TargetAddr) -> String {
        match self.target_port_range(target) {
            Some(ports) if ports.count() > 1 => format!("{target}-{}", ports.last()),
            _ => target.to_string(),
        }
    }

    /// The ports of one of its targets; `None` where the target has port 0.
    pub fn target_port_range(&self, target: TargetAddr) -> Option<PortRange> {
        let more = match (self.target_ports, self.listen.ports()) {
            (TargetPorts::Parallel, Some(range)) => range.last() - range.first().port(),
            _ => 0,
        };
        PortRange::new(target.port(), target.port().saturating_add(more))
    }

    /// The target of clients of a family, or `None` where that family is not served. Of a range of ports
    /// with the first.
    pub fn target(&self, family: Family) -> Option<TargetAddr> {
        match family {
            Family::V4 => self.target4.map(SocketAddr::V4),
            Family::V6 => self.target6.map(SocketAddr::V6),
        }
        .map(TargetAddr::new)
    }

    /// The same with the addresses that its names have now.
    pub fn with_answers(&self, answers: &Answers) -> Self {
        let mut resolved = self.clone();
        let port = self.named.port;
        for (name, family) in self.named.wanted() {
            let addr = answers
                .of(&name, family)
                .map(|ip| SocketAddr::new(ip, port));
            match (family, addr) {
                (Family::V4, Some(SocketAddr::V4(addr))) => resolved.target4 = Some(addr),
                (Family::V4, _) => resolved.target4 = None,
                (Family::V6, Some(SocketAddr::V6(addr))) => resolved.target6 = Some(addr),
                (Family::V6, _) => resolved.target6 = None,
            }
        }
        resolved
    }

    /// Every target there is, IPv4 first.
    pub fn targets(&self) -> impl Iterator<Item = TargetAddr> + '_ {
        Family::BOTH
            .into_iter()
            .filter_map(|family| self.target(family))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_systemd_carries() {
        for good in ["a", "vps01-ssh", "0", "A.b_c-d"] {
            assert!(good.parse::<InstanceName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "a b", "a/b", "a@b", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<InstanceName>().is_err(), "{bad}");
        }
    }
}
