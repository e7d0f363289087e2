//! What can be asked about a relay's connections, and the answers: values only.
//!
//! Owns: the filter, the rows of `conns` and `explain`, why a connection ended. Must not know: how
//! connections are kept, who asks, how rows are shown.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::counters::{ConnectFailure, Refusal};
use crate::model::ProxyAddr;

/// Which connections are meant; what is `None` does not restrict.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// One connection, by the number that listings give it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The client's address is in this prefix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<IpNet>,
    /// The client's port, or the port of the relay's own socket where the client's had to be given up:
    /// either is what a service may have logged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_port: Option<u16>,
    /// The proxy's address is in this prefix; that of a process behind a Unix socket is in none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<IpNet>,
    /// Nothing has moved for this many milliseconds or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_ms: Option<u64>,
}

impl Filter {
    /// Whether nothing is restricted: every connection is meant.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a connection is meant.
    pub fn matches(&self, connection: &Connection) -> bool {
        fn within(prefix: Option<IpNet>, ip: Option<IpAddr>) -> bool {
            prefix.is_none_or(|prefix| ip.is_some_and(|ip| prefix.contains(&ip)))
        }
        self.id.is_none_or(|id| id == connection.id)
            && within(self.client, connection.client.map(|client| client.ip()))
            && within(self.proxy, connection.proxy.addr().map(|proxy| proxy.ip()))
            && self.client_port.is_none_or(|port| {
                let is = |addr: Option<SocketAddr>| addr.is_some_and(|addr| addr.port() == port);
                is(connection.client) || is(connection.local)
            })
            && self.idle_ms.is_none_or(|least| connection.idle_ms >= least)
    }
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Its PROXY header is not complete.
    Header,
    /// The service has not answered yet.
    Connecting,
    /// Bytes go both ways.
    Relaying,
}

impl Stage {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Connecting => "connecting",
            Self::Relaying => "relaying",
        }
    }
}

/// A kind of header; in JSON the PROXY header's version as a number, or `"spp"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HeaderKind {
    /// A PROXY header of this version, 1 or 2.
    Proxy(u8),
    /// Another one.
    Other(OtherHeader),
}

impl HeaderKind {
    /// Simple Proxy Protocol.
    pub const SPP: Self = Self::Other(OtherHeader::Spp);
}

/// A header that is no PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OtherHeader {
    /// Simple Proxy Protocol.
    Spp,
}

impl fmt::Display for HeaderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Proxy(version) => write!(f, "PROXY v{version}"),
            Self::Other(OtherHeader::Spp) => f.write_str("SPP"),
        }
    }
}

/// One connection as it was when asked for. Unknown fields are left out of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Tells it from all others of the process.
    pub id: u64,
    /// The instance's name.
    pub instance: String,
    /// The pathway's mark; 0 where there is none.
    pub mark: u32,
    /// How far it is.
    pub stage: Stage,
    /// Who the service sees; unknown until the header is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<SocketAddr>,
    /// The sender of the header.
    pub proxy: ProxyAddr,
    /// The port at which it was accepted; absent on a Unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The relay's own socket towards the service: the client's address, and its port unless that was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    /// The service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<SocketAddr>,
    /// Milliseconds since it was accepted.
    pub age_ms: u64,
    /// Milliseconds since a byte moved.
    pub idle_ms: u64,
    /// Payload bytes handed to the service.
    pub bytes_to_target: u64,
    /// Bytes handed to the client.
    pub bytes_to_client: u64,
    /// What kind of header named the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<HeaderKind>,
    /// The unique id that the proxy sent: as text where it is printable ASCII, else hexadecimal behind 0x.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unique_id: Option<String>,
    /// The host name that the client asked the proxy for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// How it ended; absent while it is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// The end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Milliseconds since then.
    pub ago_ms: u64,
    /// Why, as [`Reason::name`] says it.
    pub reason: String,
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Both sides closed their half.
    Closed,
    /// The proxy's side failed, usually with a reset, which was passed on.
    ProxyFailed,
    /// The service's side failed, usually with a reset, which was passed on.
    ServiceFailed,
    /// Nothing moved for the idle timeout.
    Idle,
    /// Somebody asked for it (`conns kill`).
    Killed,
    /// The relay ended before the connection did.
    Cut,
    /// It never reached the service.
    Refused(Refusal),
    /// The service was not reached.
    ConnectFailed(ConnectFailure),
    /// The proxy closed without a byte.
    Empty,
}

impl Reason {
    /// The name in logs and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::ProxyFailed => "proxy-reset",
            Self::ServiceFailed => "service-reset",
            Self::Idle => "idle-timeout",
            Self::Killed => "killed",
            Self::Cut => "cut",
            Self::Refused(kind) => kind.name(),
            Self::ConnectFailed(kind) => kind.name(),
            Self::Empty => "empty",
        }
    }
}

/// A question to the worker threads of a relay.
#[derive(Debug, Clone)]
pub struct Query {
    /// What is asked.
    pub what: Ask,
    /// About which connections.
    pub filter: Filter,
    /// Where each worker's answer goes; the last one dropped ends the answers.
    pub reply: mpsc::UnboundedSender<Vec<Connection>>,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// The open connections.
    Live,
    /// Those that ended not long ago; how many are remembered is bounded.
    Recent,
    /// The open ones, which end by this.
    Kill,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> Connection {
        Connection {
            id: 7,
            instance: "vps01-ssh".to_owned(),
            mark: 123,
            stage: Stage::Relaying,
            client: Some("203.0.113.7:40000".parse().unwrap()),
            proxy: "10.0.0.1:5555".parse().unwrap(),
            port: Some(2222),
            local: Some("203.0.113.7:61000".parse().unwrap()),
            target: Some("127.0.0.1:22".parse().unwrap()),
            age_ms: 10,
            idle_ms: 5,
            bytes_to_target: 1,
            bytes_to_client: 2,
            header: Some(HeaderKind::Proxy(2)),
            unique_id: None,
            authority: None,
            ended: None,
        }
    }

    #[test]
    fn a_filter_restricts_by_what_it_says_only() {
        let filter = |json: &str| serde_json::from_str::<Filter>(json).unwrap();
        for (json, expected) in [
            ("{}", true),
            (r#"{"client":"203.0.113.0/24"}"#, true),
            (r#"{"client":"203.0.112.0/24"}"#, false),
            (r#"{"client":"::/0"}"#, false),
            (r#"{"client_port":40000}"#, true),
            (r#"{"client_port":61000}"#, true),
            (r#"{"client_port":5555}"#, false),
            (r#"{"proxy":"10.0.0.1/32","id":7}"#, true),
            (r#"{"proxy":"10.0.0.1/32","id":8}"#, false),
            (r#"{"idle_ms":5}"#, true),
            (r#"{"idle_ms":6}"#, false),
        ] {
            assert_eq!(filter(json).matches(&connection()), expected, "{json}");
        }
        assert!(serde_json::from_str::<Filter>(r#"{"cleint":"::/0"}"#).is_err());
        let unknown = Connection {
            client: None,
            ..connection()
        };
        assert!(!filter(r#"{"client":"0.0.0.0/0"}"#).matches(&unknown));
    }

    #[test]
    fn a_row_survives_json() {
        let row = connection();
        let json = serde_json::to_string(&row).unwrap();
        assert!(!json.contains("authority"), "{json}");
        assert!(json.contains(r#""header":2"#), "{json}");
        assert_eq!(serde_json::from_str::<Connection>(&json).unwrap(), row);
        let row = Connection {
            header: Some(HeaderKind::SPP),
            ..row
        };
        let json = serde_json::to_string(&row).unwrap();
        assert!(json.contains(r#""header":"spp""#), "{json}");
        assert_eq!(serde_json::from_str::<Connection>(&json).unwrap(), row);
    }
}
