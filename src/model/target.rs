//! Targets by name: what can be written instead of an address, and which addresses the names have.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::{Family, ValueError};

/// A service by its name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TargetName {
    /// As the system's resolver knows it.
    Host(String),
    /// As the container engine knows it.
    Container {
        /// The container.
        name: String,
        /// In which of its networks it is reached; needed where it is in several.
        network: Option<String>,
    },
}

impl TargetName {
    /// The longest name in the DNS.
    const MAX_HOST: usize = 253;

    /// What a container's or a network's name is made of, as Docker and Podman have it.
    fn is_object(name: &str) -> bool {
        name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
    }

    fn is_host(name: &str) -> bool {
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
        };
        let bare = name.strip_suffix('.').unwrap_or(name);
        // 127.0.0.l and 10.0.0 are slips of the pen, not names: the last label of a name is no number,
        // and what begins like an address is one
        let mut labels = bare.split('.');
        let numbers = labels
            .clone()
            .filter(|label| label.bytes().all(|byte| byte.is_ascii_digit()))
            .count();
        name.len() <= Self::MAX_HOST
            && numbers <= 1
            && numbers < labels.clone().count()
            && labels.all(is_label)
            && !bare.ends_with(|c: char| c.is_ascii_digit() && numbers > 0)
    }
}

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(name) => f.write_str(name),
            Self::Container {
                name,
                network: None,
            } => write!(f, "docker:{name}"),
            Self::Container {
                name,
                network: Some(network),
            } => write!(f, "docker:{name}@{network}"),
        }
    }
}

impl FromStr for TargetName {
    type Err = ValueError;

    /// `db.example.net`, `docker:NAME` or `docker:NAME@NETWORK`.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        if let Some(container) = text.strip_prefix("docker:") {
            let (name, network) = match container.split_once('@') {
                Some((name, network)) => (name, Some(network)),
                None => (container, None),
            };
            if Self::is_object(name) && network.is_none_or(Self::is_object) {
                return Ok(Self::Container {
                    name: name.to_owned(),
                    network: network.map(str::to_owned),
                });
            }
            return Err(ValueError::new(
                format!("'{text}' is no container's name"),
                "docker:NAME, or docker:NAME@NETWORK where the container is in several networks",
            ));
        }
        if Self::is_host(text) {
            return Ok(Self::Host(text.to_owned()));
        }
        Err(ValueError::new(
            format!("'{text}' is no host's name"),
            "a name such as db.example.net, or docker:NAME",
        ))
    }
}

impl Serialize for TargetName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// The targets of an instance that are names, and their port (of a range the first).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct NamedTargets {
    /// Of IPv4 clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v4: Option<TargetName>,
    /// Of IPv6 clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v6: Option<TargetName>,
    /// Of both; 0 where no target is a name.
    pub port: u16,
}

impl NamedTargets {
    /// The name for clients of a family.
    pub fn of(&self, family: Family) -> Option<&TargetName> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// Whether no target is a name.
    pub fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }

    /// Each name with the family it is wanted in.
    pub fn wanted(&self) -> impl Iterator<Item = (TargetName, Family)> + '_ {
        Family::BOTH
            .into_iter()
            .filter_map(|family| Some((self.of(family)?.clone(), family)))
    }
}

/// The addresses that names have, by name and family: first the one to use, then those that it had before,
/// to which connections may still be open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answers(pub BTreeMap<(TargetName, Family), Vec<IpAddr>>);

impl Answers {
    /// The address to use.
    pub fn of(&self, name: &TargetName, family: Family) -> Option<IpAddr> {
        self.all(name, family).first().copied()
    }

    /// That and the earlier ones.
    pub fn all(&self, name: &TargetName, family: Family) -> &[IpAddr] {
        self.0
            .get(&(name.clone(), family))
            .map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_out_as_they_were() {
        for text in [
            "db",
            "db.example.net",
            "db.example.net.",
            "_svc.example.net",
            "localhost",
            "3com.com",
            "node-1",
            "docker:web",
            "docker:my_app-web-1",
            "docker:web@front",
        ] {
            assert_eq!(text.parse::<TargetName>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn slips_of_the_pen_are_no_names() {
        for bad in [
            "",
            ".",
            "127.0.0",
            "127.0.0.l",
            "127.0.0.1x",
            "256.1.1.1",
            "1",
            "a..b",
            "-a",
            "a-",
            "a b",
            "ä",
            "db:22",
            "[::1]",
            "10.0.0.0/8",
            "fe80::1%eth0",
            "docker:",
            "docker:-a",
            "docker:a@",
            "docker:a b",
            "docker:a/b",
        ] {
            assert!(bad.parse::<TargetName>().is_err(), "{bad}");
        }
    }
}
