//! What was seen, as plain data: everything that a verdict may look at, and nothing else.
//!
//! Can be written as JSON (`doctor --json`) and read again, so that a verdict can be tried on what was
//! recorded elsewhere. Must not know: how it was seen, what it means.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::filters::FilterRule;
use crate::model::Family;
use crate::pathway::netlink::{Answered, SeenRule};

/// All that was seen on this host.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Evidence {
    /// What concerns every instance.
    pub host: Host,
    /// The pathways of the instances.
    pub pathways: Vec<Pathway>,
    /// The instances, in the order in which they were asked for.
    pub instances: Vec<Instance>,
}

/// The host, or the network namespace.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Host {
    /// What a person types before a verb: the program, and where it shall look.
    pub command: String,
    /// The configuration directory.
    pub config_dir: String,
    /// Why addresses cannot be spoofed here: nothing else was tried then.
    pub cannot_spoof: Option<CannotSpoof>,
    /// What could not be looked at, and why.
    pub unseen: Vec<String>,
    /// Whether `lo` speaks IPv6.
    pub ipv6: bool,
    /// Switches of the kernel by name, as far as they matter.
    pub sysctls: BTreeMap<String, String>,
    /// Every rule of both families, first to last.
    pub rules: Vec<SeenRule>,
    /// Every line of every firewall that does something to marks or packets.
    pub filters: Vec<FilterRule>,
    /// Connection tracking's table; none where it is not there.
    pub conntrack: Option<Conntrack>,
    /// systemd-networkd, where it runs here.
    pub networkd: Option<Networkd>,
    /// Packets that reverse-path filtering dropped while the probes ran.
    pub rp_filter_drops: u64,
    /// The ports that the host's own connections take, where a connect failed for want of one.
    pub ports: Option<Ports>,
    /// By family, the interface of the default route.
    pub default_route: BTreeMap<Family, Option<String>>,
}

/// Why there is no spoofing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CannotSpoof {
    /// What failed, as the end of "cannot …".
    pub operation: String,
    /// The errno.
    pub errno: i32,
}

/// Connection tracking's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conntrack {
    /// Entries of this network namespace.
    pub count: u64,
    /// As many as there may be.
    pub max: u64,
}

/// A running systemd-networkd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Networkd {
    /// Its process id.
    pub pid: u32,
    /// Whether it removes rules that it did not make.
    pub removes_rules: bool,
    /// Whether it removes routes that it did not make.
    pub removes_routes: bool,
}

/// Ports of the host's own range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// The range, both ends included.
    pub range: (u16, u16),
    /// How many of them sockets with a foreign address hold.
    pub spoofed: u32,
    /// How many of them any socket holds.
    pub taken: u32,
}

/// A pathway: wanted against what the kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pathway {
    /// Its mark.
    pub mark: u32,
    /// The bits that count.
    pub mask: u32,
    /// Its table.
    pub table: u32,
    /// Where its marked rules stand.
    pub priority: u32,
    /// Whether it stands in pathways.conf.
    pub configured: bool,
    /// Whether it wants CONNMARK lines.
    pub connmark: bool,
    /// Why it could not be looked at.
    pub unread: Option<String>,
    /// What is missing.
    pub missing: Vec<Missing>,
    /// What the next `pathway add` removes or replaces, as commands.
    pub stale: Vec<String>,
}

/// A missing piece.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Its family; none for what belongs to both.
    pub family: Option<Family>,
    /// What it is, in words.
    pub text: String,
    /// Whether it is the rule that stands in for a default route.
    pub unrouted: bool,
    /// Whether nothing is missing, but the table is another program's.
    pub taken: bool,
    /// Whether it is a switch of the kernel, which is only set when somebody says so.
    pub sysctl: bool,
}

/// An instance.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// The mark of its pathway.
    pub mark: u32,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Where it accepts.
    pub listen: Option<SocketAddr>,
    /// Whether that address is on an interface of this host.
    pub listen_here: bool,
    /// Whether clients keep their port.
    pub keeps_ports: bool,
    /// `max-connections=`.
    pub max_connections: Option<u32>,
    /// The allow list's file.
    pub allow_file: String,
    /// The proxies that are believed.
    pub allow: Vec<IpNet>,
    /// Its services.
    pub targets: Vec<Target>,
    /// The process that runs it.
    pub relay: Option<Relay>,
}

/// A service and the ways to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Target {
    /// The family.
    pub family: Family,
    /// Its address.
    pub address: SocketAddr,
    /// Where it is.
    pub place: Place,
    /// Who the spoofed probe claimed to be.
    pub client: IpAddr,
    /// A connection from this host. UDP: an empty datagram, or for a local service, whether one is bound.
    pub plain: Outcome,
    /// The same way as the spoofed one, but not spoofed. UDP: to a port that is closed.
    pub baseline: Outcome,
    /// A connection from the client's address, with the mark. UDP: to a port that is closed, whose ICMP
    /// answer takes the way of the service's answers.
    pub spoofed: Outcome,
    /// What connection tracking remembers of the spoofed one.
    pub entry: Entry,
    /// The answer's route with the mark.
    pub marked: Answered,
    /// The answer's route without the mark: its first look-up.
    pub unmarked: Answered,
    /// The way to the service with the mark.
    pub forward: Answered,
    /// The way to the client of a service that leaves its own address to the kernel.
    pub chosen: Answered,
    /// Who listens on the port in this network namespace.
    pub listeners: Vec<Listener>,
    /// Clients whose packets a firewall line that stands here singles out, and what became of them.
    pub singled_out: Vec<SingledOut>,
    /// Rules of others before ours that take the answer to some clients.
    pub shadows: Vec<Shadow>,
}

/// Where a service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// 127.0.0.0/8 or ::1.
    Loopback,
    /// Another address of this host.
    Own,
    /// Another host, or a container.
    Remote,
    /// No route leads there.
    Nowhere,
}

/// What became of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was not tried.
    Untried,
    /// The way there and back is open, after so many microseconds.
    Open(u64),
    /// Refused: the way is open and nobody is there.
    Refused,
    /// Silence.
    Silent,
    /// The kernel said no, with this errno.
    Failed(i32),
}

impl Outcome {
    /// Whether packets came back.
    pub fn came_back(&self) -> bool {
        matches!(self, Self::Open(_) | Self::Refused)
    }
}

/// What connection tracking remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entry {
    /// It was not asked, or could not be.
    Unknown,
    /// Nothing.
    Absent,
    /// A connection.
    Seen {
        /// Its mark.
        mark: u32,
        /// `SYN_SENT`, `SYN_RECV`, …; empty for UDP.
        state: String,
        /// Whether an answer was seen.
        replied: bool,
    },
}

/// A socket that others can connect or send to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// Where it is bound.
    pub address: SocketAddr,
    /// Whose it is, where that can be seen.
    pub process: Option<Process>,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// What it was called with.
    pub arguments: Vec<String>,
}

/// A probe for clients that a firewall line names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SingledOut {
    /// The clients.
    pub clients: IpNet,
    /// The line's number in the host's list.
    pub filter: usize,
    /// What became of a spoofed connection from one of them.
    pub outcome: Outcome,
}

/// A rule of others that takes answers away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shadow {
    /// The rule's number in the host's list.
    pub rule: usize,
    /// The clients.
    pub clients: IpNet,
    /// Where the marked answer to one of them goes.
    pub answer: Answered,
}

/// A running relay.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Relay {
    /// The process that runs it.
    pub pid: u32,
    /// How many descriptors it may have; none where that cannot be seen.
    pub descriptors: Option<u64>,
    /// How many it may give itself.
    pub descriptors_at_most: Option<u64>,
    /// Times that accepting paused because descriptors ran out.
    pub accept_pauses: u64,
    /// What went wrong with connections lately, one for each kind and proxy.
    pub errors: Vec<RelayError>,
}

/// A kind of error of one proxy's connections, as it was last seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayError {
    /// Which, as `status --json` names it.
    pub kind: String,
    /// The proxy.
    pub proxy: IpAddr,
    /// The client, where the header had named it.
    pub client: Option<IpAddr>,
    /// How many seconds ago.
    pub ago: u64,
    /// What the relay logged.
    pub message: String,
    /// Whether a connection of that proxy was relayed since.
    pub mended: bool,
}
