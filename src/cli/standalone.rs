//! `run --listen …` and `run --json-config FILE`: relays that are in no instances.tsv.

use std::net::{SocketAddrV4, SocketAddrV6};
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use ipnet::IpNet;

use crate::model::{InstanceName, Listen, Mark, parse_prefix};

const FILES: [&str; 3] = ["instances", "all", "watch_config"];
const HEADING: &str = "A relay without files";

/// A relay that no instances.tsv has.
#[derive(Debug, Clone, Default, Args)]
#[command(
    next_help_heading = HEADING,
    group(ArgGroup::new("target").args(["target4", "target6", "target_source"]).multiple(true)),
)]
pub struct StandaloneArgs {
    /// Where the proxy connects to: an address with a port or a range of ports, or unix:/path; with
    /// --listen-transparent also a network, 203.0.113.0/24:443
    #[arg(long, value_name = "ADDR:PORT", conflicts_with_all = FILES, requires = "target")]
    pub listen: Option<Listen>,
    /// Where IPv4 clients go
    #[arg(long, value_name = "ADDR:PORT", requires = "listen")]
    pub target4: Option<SocketAddrV4>,
    /// Where IPv6 clients go
    #[arg(long, value_name = "[ADDR]:PORT", requires = "listen")]
    pub target6: Option<SocketAddrV6>,
    /// The mark of its pathway [default: none; replies are then led back by rules of your own]
    #[arg(long, value_name = "MARK", requires = "listen")]
    pub mark: Option<Mark>,
    /// What it is called in status and logs [default: protocol, address and port]
    #[arg(long, value_name = "NAME", requires = "listen")]
    pub name: Option<InstanceName>,
    /// The routes of the JSON file that the mmproxy with several routes reads
    #[arg(long, value_name = "FILE", conflicts_with_all = FILES, conflicts_with = "listen")]
    pub json_config: Option<PathBuf>,
    /// The trusted proxies [default: $ALLOW_LIST_PATH, else allow.txt in the configuration directory]
    #[arg(long, value_name = "FILE", conflicts_with_all = FILES)]
    pub allow: Option<PathBuf>,
    /// A trusted proxy, an address or a prefix, instead of a file; may be repeated
    #[arg(long, value_name = "ADDR", conflicts_with_all = FILES, conflicts_with = "allow", value_parser = parse_prefix)]
    pub trust: Vec<IpNet>,
    /// The options of an instance.
    #[command(flatten)]
    pub options: OptionFlags,
}

/// The options column of instances.tsv as flags; they are read by what reads the column.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = HEADING)]
pub struct OptionFlags {
    /// tcp or udp [default: tcp]
    #[arg(long, value_name = "PROTOCOL", requires = "listen")]
    pub protocol: Option<String>,
    /// UDP: the header is on every datagram, the first of a flow, or spp [default: every]
    #[arg(long, value_name = "every|first|spp", requires = "listen")]
    pub udp_header: Option<String>,
    /// When a silent connection or flow ends [default: never, UDP 60s]
    #[arg(long, value_name = "TIME", requires = "listen")]
    pub idle_timeout: Option<String>,
    /// How long the proxy may take to send its header [default: 5s]
    #[arg(long, value_name = "TIME", requires = "listen")]
    pub header_timeout: Option<String>,
    /// How long the target may take to answer [default: 5s]
    #[arg(long, value_name = "TIME", requires = "listen")]
    pub connect_timeout: Option<String>,
    /// How many sockets share the listen address [default: one per worker]
    #[arg(long, value_name = "N", requires = "listen")]
    pub listeners: Option<String>,
    /// For addresses that are routed to this host without being its own: TPROXY hands over what is sent there
    #[arg(long, requires = "listen")]
    pub listen_transparent: bool,
    /// Whether the client's port is kept [default: keep]
    #[arg(long, value_name = "keep|any", requires = "listen")]
    pub port: Option<String>,
    /// How many connections at a time [default: no limit]
    #[arg(long, value_name = "N", requires = "listen")]
    pub max_connections: Option<String>,
    /// UDP: how many flows at a time [default: 65536]
    #[arg(long, value_name = "N", requires = "listen")]
    pub max_flows: Option<String>,
    /// UDP: how many of them from one proxy, at most all [default: three quarters]
    #[arg(long, value_name = "N", requires = "listen")]
    pub max_flows_per_proxy: Option<String>,
    /// unix:/path: the permissions of the socket's file; who may write to it is believed [default: 0660]
    #[arg(long, value_name = "MODE", requires = "listen")]
    pub socket_mode: Option<String>,
    /// unix:/path: whom the socket's file is given to
    #[arg(long, value_name = "USER:GROUP", requires = "listen")]
    pub socket_owner: Option<String>,
    /// How often targets that are names are looked up again [default: 30s]
    #[arg(long, value_name = "TIME", requires = "listen")]
    pub resolve: Option<String>,
    /// Clients go to the destination in the PROXY header
    #[arg(
        id = "target_source",
        long = "target",
        value_name = "header",
        requires = "listen",
        requires = "destinations"
    )]
    pub target: Option<String>,
    /// With --target header: which destinations are relayed to, + between them
    #[arg(long, value_name = "NET+NET", requires = "target_source")]
    pub destinations: Option<String>,
}

impl OptionFlags {
    /// Those that were given, by their keys in instances.tsv.
    pub fn words(&self) -> Vec<(&'static str, &str)> {
        let Self {
            protocol,
            udp_header,
            idle_timeout,
            header_timeout,
            connect_timeout,
            listeners,
            listen_transparent,
            port,
            max_connections,
            max_flows,
            max_flows_per_proxy,
            socket_mode,
            socket_owner,
            resolve,
            target,
            destinations,
        } = self;
        let all = [
            ("protocol", protocol),
            ("udp-header", udp_header),
            ("idle-timeout", idle_timeout),
            ("header-timeout", header_timeout),
            ("connect-timeout", connect_timeout),
            ("listeners", listeners),
            ("port", port),
            ("max-connections", max_connections),
            ("max-flows", max_flows),
            ("max-flows-per-proxy", max_flows_per_proxy),
            ("socket-mode", socket_mode),
            ("socket-owner", socket_owner),
            ("resolve", resolve),
            ("target", target),
            ("destinations", destinations),
        ];
        let transparent = listen_transparent.then_some(("listen", "transparent"));
        all.into_iter()
            .filter_map(|(key, value)| Some((key, value.as_deref()?)))
            .chain(transparent)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use crate::cli::Cli;
    use crate::config::OPTIONS;

    #[test]
    fn every_option_of_an_instance_is_a_flag() {
        let mut cli = Cli::command();
        cli.build();
        let run = cli.find_subcommand("run").unwrap();
        for option in OPTIONS {
            // --listen is the address
            let option = match option {
                "listen" => "listen-transparent",
                other => other,
            };
            let flag = run
                .get_arguments()
                .any(|arg| arg.get_long() == Some(option));
            assert!(flag, "run has no --{option}");
        }
    }
}
