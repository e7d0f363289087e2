//! What can be typed: clap definitions only.

use std::net::IpAddr;
use std::num::{NonZeroU16, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

mod conns;
mod import;
mod probe;
mod standalone;

use crate::edge::Kind;
use crate::metrics::Endpoint;
use crate::model::{ValueError, parse_duration};
use crate::pathway::Firewall;

pub use conns::{
    ClientMatch, ConnsAction, ConnsCommand, ConnsKillArgs, ConnsListArgs, WhichConnsArgs,
};
pub use import::{ImportArgs, ImportSource};
pub use probe::{Corruption, HeaderForm, ProbeArgs};
pub use standalone::{OptionFlags, StandaloneArgs};

/// Lets services behind a PROXY-protocol sender see their real clients: kernel pathways and relays.
#[derive(Debug, Parser)]
#[command(name = "mmproxyctl", version, about, max_term_width = 100)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// The verb.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Where pathways.conf, instances.tsv and allow.txt are
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "MMPROXY_CONFIG_DIR",
        default_value = "/etc/mmproxy"
    )]
    pub config_dir: PathBuf,
    /// Where locks and control sockets live [default: $RUNTIME_DIRECTORY, else /run/mmproxy]
    #[arg(long, global = true, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// What gives the services' answers their mark
    #[arg(
        long,
        global = true,
        value_name = "BACKEND",
        env = "MMPROXY_FIREWALL",
        default_value = "auto"
    )]
    pub firewall: Firewall,
    /// Let --firewall none set net.ipv4.tcp_fwmark_accept, for the whole host; 'pathway del' sets it back
    #[arg(long, global = true, env = "MMPROXY_SET_SYSCTLS", value_parser = clap::builder::FalseyValueParser::new())]
    pub set_sysctls: bool,
    /// How logs are written on stderr
    #[arg(long, global = true, value_name = "FORMAT", default_value = "auto")]
    pub log_format: LogFormat,
    /// Say more: -v the errors of single connections (go-mmproxy's -v 1), -vv every change of their state (its -v 2)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Say warnings and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text, in colour on a terminal; to the journal where systemd connected stderr with it
    Auto,
    /// Text without colour
    Text,
    /// One JSON object a line
    Json,
    /// To the journal, with fields to search by: journalctl CLIENT=203.0.113.7
    Journald,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Install, remove, show and check the kernel's return roads
    #[command(subcommand)]
    Pathway(PathwayCommand),
    /// Run relays in the foreground: one process, one relay per instance
    Run(Box<RunArgs>),
    /// Have running processes read the files again; unchanged instances are not touched
    Reload(ReloadArgs),
    /// Have running processes start this program anew and hand over to it; no connection is lost
    Upgrade(UpgradeArgs),
    /// Have running processes make way for another: no new connections, the open ones go on until they end
    Release(ReleaseArgs),
    /// Show what runs: every instance, its pathway, connections, rates and errors
    Status(StatusArgs),
    /// List open connections, or end some
    Conns(ConnsCommand),
    /// Watch instances and connections live
    Top(TopArgs),
    /// Tell which way a client's connection came: for an address in a service's log
    Explain(ExplainArgs),
    /// Validate the three files and show what they say
    Check(CheckArgs),
    /// Prove each pathway with a spoofed connection; name what is wrong and the command that mends it
    Doctor(DoctorArgs),
    /// Be the proxy: send a PROXY header for a given client, then pass stdin and stdout
    Probe(ProbeArgs),
    /// Print what belongs into the configuration of the proxy in front of an instance
    EdgeConfig(EdgeConfigArgs),
    /// Turn what runs today into the two files: go-mmproxy, its forks and relatives, the shell set-up
    Import(ImportArgs),
    /// Make the links go-mmproxy and mmproxy, under which the old programs' flags are understood
    Link(LinkArgs),
    /// Show the whole chain in private network namespaces; nothing on the host is touched
    Demo(DemoArgs),
    /// Print a shell's completion script
    Completions(CompletionsArgs),
    /// Print the manual, or write its pages into a directory
    Man(ManArgs),
}

/// `pathway …`.
#[derive(Debug, Subcommand)]
pub enum PathwayCommand {
    /// Install what is missing
    Add(PathwayChangeArgs),
    /// Remove exactly what is ours
    Del(PathwayChangeArgs),
    /// Install every pathway of pathways.conf
    AddAll(PathwayAllArgs),
    /// Remove every pathway of pathways.conf
    DelAll(PathwayAllArgs),
    /// Show every pathway: wanted against what the kernel has
    List(PathwayListArgs),
    /// Exit 0 when all is in place, 1 with each missing piece named
    Check(PathwayCheckArgs),
    /// Install every pathway of pathways.conf and keep it: what another program removes is put back at once
    Watch(PathwayWatchArgs),
}

/// `pathway add` and `pathway del`.
#[derive(Debug, Args)]
pub struct PathwayChangeArgs {
    /// Marks (123, 0x7b) or names of instances
    #[arg(value_name = "TARGET", required_unless_present = "all")]
    pub targets: Vec<String>,
    /// Every pathway of pathways.conf
    #[arg(long, conflicts_with = "targets")]
    pub all: bool,
    /// How it is done
    #[command(flatten)]
    pub change: PathwayAllArgs,
}

/// `pathway add-all` and `pathway del-all`.
#[derive(Debug, Args)]
pub struct PathwayAllArgs {
    /// Print the equivalent ip and iptables commands, change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `pathway list`.
#[derive(Debug, Args)]
pub struct PathwayListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `pathway check`.
#[derive(Debug, Args)]
pub struct PathwayCheckArgs {
    /// Marks or names of instances; none means every pathway of pathways.conf
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `pathway watch`.
#[derive(Debug, Args)]
#[command(after_help = WATCH_HELP)]
pub struct PathwayWatchArgs {
    /// Leave the pathways in place at the end
    #[arg(long)]
    pub no_remove: bool,
    /// How often to look at what the kernel does not tell of: sysctls, and iptables-legacy
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse_duration)]
    pub poll: Duration,
}

const WATCH_HELP: &str = "\
Runs in the foreground until SIGTERM or SIGINT, then removes the pathways. Reads the files again when
they change, and on SIGHUP; a mistake in them changes nothing. What they no longer want stays while
connections use it. Every repair is logged with what was lost and who took it, as far as the kernel
tells. What takes a pathway away again and again is given way to, for up to 30 s at a time.";

/// `run`.
#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// The instances, as named in instances.tsv
    #[arg(value_name = "INSTANCE", required_unless_present_any = ["all", "listen", "json_config"])]
    pub instances: Vec<String>,
    /// Instead of instances: a relay that no file names.
    #[command(flatten)]
    pub standalone: StandaloneArgs,
    /// Every instance of instances.tsv, also those that are added later
    #[arg(long, conflicts_with = "instances")]
    pub all: bool,
    /// Reload by itself when a file of the configuration changes
    #[arg(long)]
    pub watch_config: bool,
    /// Install the pathways that are needed, keep them in place, and remove them at the end
    #[arg(long, conflicts_with = "no_check")]
    pub manage_pathways: bool,
    /// Start although the pathway may not be in place
    #[arg(long)]
    pub no_check: bool,
    /// Serve metrics for Prometheus at this address and port, or Unix socket, under /metrics
    #[arg(long, value_name = "ADDR:PORT|PATH")]
    pub metrics: Option<Endpoint>,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroUsize>,
    /// Never use io_uring, which saves system calls where many connections have small pieces to pass on
    #[arg(long)]
    pub no_io_uring: bool,
    /// How long open connections may go on after SIGTERM, such as 30s, 500ms or 2m; a second signal ends them at once
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = drain_timeout)]
    pub drain_timeout: Duration,
    /// Relay in a child process, so that this one can end while open connections go on: see release
    #[arg(long)]
    pub keep_sessions: bool,
}

/// `reload`.
#[derive(Debug, Args)]
#[command(after_help = RELOAD_HELP)]
pub struct ReloadArgs {
    /// Only these processes: "all" for run --all, else their first instance's name
    #[arg(value_name = "PROCESS")]
    pub processes: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

const RELOAD_HELP: &str = "\
Exit code 0 when the files were taken and every instance runs; 1 when an instance does not (it is named
with the reason, the others run, and it is tried again and again) or a process does not answer; 2 when
the files have a mistake, and nothing was changed.";

/// `upgrade`.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// Only these processes: "all" for run --all, else their first instance's name
    #[arg(value_name = "PROCESS")]
    pub processes: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `release`.
#[derive(Debug, Args)]
pub struct ReleaseArgs {
    /// Only these processes: "all" for run --all, else their first instance's name
    #[arg(value_name = "PROCESS")]
    pub processes: Vec<String>,
    /// Do nothing unless systemd is restarting this unit: for its ExecStop=
    #[arg(long, value_name = "UNIT")]
    pub if_restarting: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn drain_timeout(text: &str) -> Result<Duration, ValueError> {
    match text {
        "0" | "0s" => Ok(Duration::ZERO),
        text => parse_duration(text),
    }
}

/// `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Instances to show in full; none means a table of all
    #[arg(value_name = "INSTANCE")]
    pub instances: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Show it again every so often, every 2 s unless said
    #[arg(
        long,
        value_name = "DURATION",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2s",
        value_parser = parse_duration,
    )]
    pub watch: Option<Duration>,
}

/// `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Instances to watch; none means all
    #[arg(value_name = "INSTANCE")]
    pub instances: Vec<String>,
    /// The time between two looks
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    pub interval: Duration,
}

/// `explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The client as the service saw it: an address, or an address with its port
    #[arg(value_name = "CLIENT[:PORT]")]
    pub client: ClientMatch,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `edge-config`.
#[derive(Debug, Args)]
pub struct EdgeConfigArgs {
    /// The instance, as named in instances.tsv
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    /// The proxy
    #[arg(value_name = "KIND")]
    pub kind: Kind,
    /// Where the proxy reaches this host [default: the instance's listen address]
    #[arg(long, value_name = "ADDR")]
    pub address: Option<IpAddr>,
    /// The port on which the proxy serves the public [default: the service's own]
    #[arg(long, value_name = "PORT")]
    pub public_port: Option<NonZeroU16>,
}

/// `link`.
#[derive(Debug, Args)]
pub struct LinkArgs {
    /// Where to make them [default: beside this program]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Instances, as named in instances.tsv; none means all of them. With --demo: faults
    #[arg(value_name = "INSTANCE")]
    pub instances: Vec<String>,
    /// Print JSON (docs/doctor.md)
    #[arg(long)]
    pub json: bool,
    /// Put in place what is missing of the pathways; everything else is only printed
    #[arg(long)]
    pub fix: bool,
    /// Show each fault and its verdict in private network namespaces; nothing on the host is touched
    #[arg(long, conflicts_with_all = ["json", "fix"])]
    pub demo: bool,
}

/// `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {}

/// `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// `man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write one file for each page there, those of go-mmproxy and mmproxy among them
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}
