//! What can be wrong, and how it is said.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Every fault that has a name. The names are what `--json` says and what docs/doctor.md explains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// This program may not spoof or look.
    MissingCapability,
    /// The kernel cannot do what a pathway needs.
    KernelFeatureMissing,
    /// Rules, routes or the firewall could not be read.
    Unreadable,
    /// The instance has an IPv6 target and IPv6 is off.
    Ipv6Disabled,
    /// A rule, route or CONNMARK line is not there.
    PathwayPieceMissing,
    /// Another program uses the pathway's table.
    TableTaken,
    /// The host has no default route, and the rule that stands in for it is not there.
    NoDefaultRoute,
    /// `route_localnet` is on and the rule that it makes harmful is still there.
    RouteLocalnet,
    /// Rules of another program come first because of this pathway's `priority=`.
    PriorityBehindForeignRules,
    /// A rule of another program comes first.
    ForeignRuleShadows,
    /// Another program uses bits of the mark.
    MarkOverlap,
    /// A firewall drops the relay's packets or the answers.
    FirewallDrop,
    /// A firewall keeps connection tracking from seeing the flow.
    NotTracked,
    /// Connection tracking's table is full.
    ConntrackFull,
    /// Reverse-path filtering drops the answers.
    RpFilter,
    /// The same, because it does not look at the mark.
    SrcValidMark,
    /// docker-proxy listens on the target's port: the service would see its address.
    DockerProxy,
    /// Nobody listens at the target.
    ServiceDown,
    /// Somebody listens on the port, at another address.
    ServiceElsewhere,
    /// A UDP service on the wildcard address answers from another one.
    WildcardUdp,
    /// The target does not answer anybody.
    TargetSilent,
    /// The target is on another host whose answers go elsewhere.
    NoWayBack,
    /// The host's own connections have no ports left.
    PortsExhausted,
    /// The listen address is on no interface.
    ListenAddressAbsent,
    /// A proxy that is not on the allow list connects.
    ProxyNotAllowed,
    /// A proxy sends no PROXY header, or not all of it.
    NoHeader,
    /// A proxy sends the header only with the client's first bytes.
    LateHeader,
    /// systemd-networkd removes rules and routes of others.
    NetworkdRemovesRules,
    /// The relay may not open enough descriptors.
    DescriptorLimit,
    /// Spoofed connections fail and nothing that was seen explains it.
    Unexplained,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => f.write_str(&name),
            _ => fmt::Debug::fmt(self, f),
        }
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Connections are lost, or will be.
    Fault,
    /// Worth knowing; nothing that this configuration does is lost.
    Note,
}

/// A fault, whom it concerns, and how it is mended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Which.
    pub fault: Fault,
    /// How bad.
    pub severity: Severity,
    /// The instances that it concerns.
    pub instances: Vec<String>,
    /// What is wrong, in one line.
    pub verdict: String,
    /// What was seen.
    pub evidence: Vec<String>,
    /// What mends it.
    pub fix: Fix,
}

/// What mends a fault.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fix {
    /// The pathway that `--fix` puts in place, where that mends it.
    pub pathway: Option<u32>,
    /// Commands for a shell, as they are.
    pub commands: Vec<String>,
    /// The host on which they are to be run, where it is not this one.
    pub on: Option<IpAddr>,
    /// What has to be done that is no command, or what to know about the commands.
    pub advice: Option<String>,
}

impl Fix {
    /// Commands and nothing else.
    pub(super) fn run(commands: impl IntoIterator<Item = String>) -> Self {
        Self {
            commands: commands.into_iter().collect(),
            ..Self::default()
        }
    }

    /// No command: somebody has to do something.
    pub(super) fn advise(advice: impl Into<String>) -> Self {
        Self {
            advice: Some(advice.into()),
            ..Self::default()
        }
    }

    /// The same with something to know.
    pub(super) fn knowing(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}
