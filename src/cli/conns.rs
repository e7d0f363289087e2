//! `conns` and `conns kill`, and how clients are named there and in `explain`.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Subcommand};
use ipnet::IpNet;

use crate::model::{ValueError, parse_duration, parse_prefix};
use crate::overview::Sort;

/// `conns` and `conns kill`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ConnsCommand {
    /// What to do instead of listing.
    #[command(subcommand)]
    pub action: Option<ConnsAction>,
    /// What to list.
    #[command(flatten)]
    pub list: ConnsListArgs,
}

/// `conns …`.
#[derive(Debug, Subcommand)]
pub enum ConnsAction {
    /// End connections: both sides get a reset
    Kill(ConnsKillArgs),
}

/// `conns`.
#[derive(Debug, Args)]
pub struct ConnsListArgs {
    /// Which connections.
    #[command(flatten)]
    pub which: WhichConnsArgs,
    /// In which order
    #[arg(long, value_name = "KEY", default_value = "age")]
    pub sort: Sort,
    /// Show at most so many
    #[arg(long, value_name = "NUMBER")]
    pub limit: Option<usize>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `conns kill`.
#[derive(Debug, Args)]
pub struct ConnsKillArgs {
    /// Which connections.
    #[command(flatten)]
    pub which: WhichConnsArgs,
    /// The one with this id (conns --json)
    #[arg(long, value_name = "ID")]
    pub id: Option<u64>,
    /// Every connection that nothing else restricts; without this, something has to
    #[arg(long)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Which connections are meant.
#[derive(Debug, Clone, Args)]
pub struct WhichConnsArgs {
    /// Those of these instances
    #[arg(value_name = "INSTANCE")]
    pub instances: Vec<String>,
    /// Those of this client: an address, a prefix, or an address with its port
    #[arg(long, value_name = "CLIENT")]
    pub client: Option<ClientMatch>,
    /// Those that came through this proxy: an address or a prefix
    #[arg(long, value_name = "PROXY", value_parser = parse_prefix)]
    pub proxy: Option<IpNet>,
    /// Those on which nothing has moved for so long
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub idle: Option<Duration>,
}

/// Clients by prefix, or one by address and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientMatch {
    /// The address is in here.
    pub prefix: IpNet,
    /// The port, if one was named.
    pub port: Option<u16>,
}

impl std::str::FromStr for ClientMatch {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if let Ok(addr) = text.parse::<SocketAddr>() {
            return Ok(Self {
                prefix: addr.ip().to_canonical().into(),
                port: Some(addr.port()),
            });
        }
        let bare = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'))
            .unwrap_or(text);
        let prefix = parse_prefix(bare).map_err(|_| {
            ValueError::new(
                format!("'{text}' names no client"),
                "203.0.113.7, 203.0.113.0/24, 203.0.113.7:40000 or [2001:db8::7]:40000",
            )
        })?;
        Ok(Self { prefix, port: None })
    }
}
