//! The options of an instance, and the words that some of them take.

use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use super::duration::{self, Written};
use super::{Protocol, SocketMode, SocketOwner, ValueError};

/// Which datagrams of a UDP sender carry the PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum UdpHeader {
    /// Every one (dnsdist).
    #[default]
    Every,
    /// The first of a flow (Cloudflare Spectrum v2, Traefik, frp).
    First,
    /// Every one, both ways, as Simple Proxy Protocol.
    Spp,
}

impl fmt::Display for UdpHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Every => "every",
            Self::First => "first",
            Self::Spp => "spp",
        })
    }
}

impl FromStr for UdpHeader {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "every" => Ok(Self::Every),
            "first" => Ok(Self::First),
            "spp" => Ok(Self::Spp),
            _ => Err(ValueError::new(
                format!("'{text}' is not a udp-header mode"),
                "every, first or spp",
            )),
        }
    }
}

/// What becomes of the client's port on the spoofed socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PortPolicy {
    /// Kept, so that the service sees the client's port too.
    #[default]
    Keep,
    /// Chosen by the kernel at connect (`IP_BIND_ADDRESS_NO_PORT`): the host's own connections keep their ports.
    Any,
}

impl fmt::Display for PortPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "keep",
            Self::Any => "any",
        })
    }
}

impl FromStr for PortPolicy {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "keep" => Ok(Self::Keep),
            "any" => Ok(Self::Any),
            _ => Err(ValueError::new(
                format!("'{text}' is not a port policy"),
                "keep or any",
            )),
        }
    }
}

/// How an instance's socket listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ListenMode {
    /// On addresses of this host's own.
    #[default]
    Own,
    /// On whatever rules of the kernel's hand to it (`IP_TRANSPARENT`, TPROXY).
    Transparent,
}

impl ListenMode {
    /// Whether it is what an instance does that says nothing.
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl FromStr for ListenMode {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "transparent" => Ok(Self::Transparent),
            _ => Err(ValueError::new(
                format!("'{text}' is not a way to listen"),
                "transparent, or no listen= (the address is column 3, listen_addr)",
            )),
        }
    }
}

/// The options of an instance, with every default filled in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InstanceOptions {
    /// `protocol=`.
    pub protocol: Protocol,
    /// `udp-header=`, meaningful for UDP only.
    pub udp_header: UdpHeader,
    /// `idle-timeout=`: none for TCP, 60 s for UDP unless said; seconds in JSON.
    #[serde(serialize_with = "duration::serialize_option")]
    pub idle_timeout: Option<Duration>,
    /// `header-timeout=`: how long a proxy may take to send its header; seconds in JSON.
    #[serde(serialize_with = "duration::serialize")]
    pub header_timeout: Duration,
    /// `connect-timeout=`: how long the target may take to answer; seconds in JSON.
    #[serde(serialize_with = "duration::serialize")]
    pub connect_timeout: Duration,
    /// `allow=`: an allow list of the instance's own, absolute or relative to the configuration directory.
    pub allow: Option<PathBuf>,
    /// `listeners=`: sockets that share the listen address (go-mmproxy's `-listeners`); `None` leaves it to the relay.
    pub listeners: Option<NonZeroU32>,
    /// `listen=`.
    #[serde(skip_serializing_if = "ListenMode::is_default")]
    pub listen: ListenMode,
    /// `port=`.
    pub port: PortPolicy,
    /// `max-connections=`; `None` is no limit but the descriptors'.
    pub max_connections: Option<NonZeroU32>,
    /// `max-flows=`: UDP's max-connections; beyond it the flow that has been silent for longest ends.
    pub max_flows: Option<NonZeroU32>,
    /// `max-flows-per-proxy=`: of these, how many from one proxy address; three quarters unless said.
    pub max_flows_per_proxy: Option<NonZeroU32>,
    /// `socket-mode=`: the permissions of a Unix socket's file; [`SocketMode::DEFAULT`] unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<SocketMode>,
    /// `socket-owner=`: whom a Unix socket's file is given to; stays with the process's user unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_owner: Option<SocketOwner>,
    /// `target=header` with these `destinations=`: the target is where the client wanted to go, as far as it is
    /// in one of these prefixes. `None`: the target is the instance's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destinations: Option<Vec<IpNet>>,
    /// `resolve=`: how often targets that are names are looked up again; seconds in JSON.
    #[serde(
        serialize_with = "duration::serialize_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub resolve: Option<Duration>,
}

impl InstanceOptions {
    /// How many UDP flows there may be.
    pub const DEFAULT_MAX_FLOWS: NonZeroU32 = NonZeroU32::new(65_536).unwrap();
    /// What a proxy gets to send its header; the specification recommends at least 3 s.
    pub const DEFAULT_HEADER_TIMEOUT: Duration = Duration::from_secs(5);
    /// What a target gets to accept.
    pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    /// When a silent UDP flow ends.
    pub const DEFAULT_UDP_IDLE_TIMEOUT: Duration = Duration::from_secs(60);

    /// The options of an instance that says nothing but its protocol.
    pub fn defaults(protocol: Protocol) -> Self {
        Self {
            protocol,
            udp_header: UdpHeader::default(),
            idle_timeout: match protocol {
                Protocol::Tcp => None,
                Protocol::Udp => Some(Self::DEFAULT_UDP_IDLE_TIMEOUT),
            },
            header_timeout: Self::DEFAULT_HEADER_TIMEOUT,
            connect_timeout: Self::DEFAULT_CONNECT_TIMEOUT,
            allow: None,
            listeners: None,
            listen: ListenMode::default(),
            port: PortPolicy::default(),
            max_connections: None,
            max_flows: None,
            max_flows_per_proxy: None,
            socket_mode: None,
            socket_owner: None,
            destinations: None,
            resolve: None,
        }
    }
}

/// Prefixes as `destinations=` has them.
pub(super) fn joined(prefixes: &[IpNet]) -> String {
    let texts: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
    texts.join("+")
}

/// The options as instances.tsv has them: what differs from the defaults, comma-separated; empty when nothing does.
impl fmt::Display for InstanceOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            protocol,
            udp_header,
            idle_timeout,
            header_timeout,
            connect_timeout,
            allow,
            listeners,
            listen,
            port,
            max_connections,
            max_flows,
            max_flows_per_proxy,
            socket_mode,
            socket_owner,
            destinations,
            resolve,
        } = self;
        let default = Self::defaults(*protocol);
        let mut words = Vec::new();
        if *protocol != Protocol::default() {
            words.push(format!("protocol={protocol}"));
        }
        if *udp_header != default.udp_header {
            words.push(format!("udp-header={udp_header}"));
        }
        if let Some(timeout) = idle_timeout.filter(|_| *idle_timeout != default.idle_timeout) {
            words.push(format!("idle-timeout={}", Written(timeout)));
        }
        if *header_timeout != default.header_timeout {
            words.push(format!("header-timeout={}", Written(*header_timeout)));
        }
        if *connect_timeout != default.connect_timeout {
            words.push(format!("connect-timeout={}", Written(*connect_timeout)));
        }
        if let Some(file) = allow {
            words.push(format!("allow={}", file.display()));
        }
        if let Some(count) = listeners {
            words.push(format!("listeners={count}"));
        }
        if !listen.is_default() {
            words.push("listen=transparent".to_owned());
        }
        if *port != default.port {
            words.push(format!("port={port}"));
        }
        if let Some(count) = max_connections {
            words.push(format!("max-connections={count}"));
        }
        if let Some(count) = max_flows {
            words.push(format!("max-flows={count}"));
        }
        if let Some(count) = max_flows_per_proxy {
            words.push(format!("max-flows-per-proxy={count}"));
        }
        if let Some(mode) = socket_mode {
            words.push(format!("socket-mode={mode}"));
        }
        if let Some(owner) = socket_owner {
            words.push(format!("socket-owner={owner}"));
        }
        if let Some(prefixes) = destinations {
            words.push(format!("target=header,destinations={}", joined(prefixes)));
        }
        if let Some(interval) = resolve {
            words.push(format!("resolve={}", Written(*interval)));
        }
        f.write_str(&words.join(","))
    }
}
