//! What can be typed: clap definitions only.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::model::{ValueError, parse_duration};

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
    /// Text, in colour on a terminal
    Auto,
    /// Text without colour
    Text,
    /// One JSON object a line
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Install, remove, show and check the kernel's return roads
    #[command(subcommand)]
    Pathway(PathwayCommand),
    /// Run an instance's relay in the foreground
    Run(RunArgs),
    /// Validate the three files and show what they say
    Check(CheckArgs),
    /// Be the proxy: send a PROXY header for a given client, then pass stdin and stdout
    Probe(ProbeArgs),
    /// Show the whole chain in private network namespaces; nothing on the host is touched
    Demo(DemoArgs),
    /// Print a shell's completion script
    Completions(CompletionsArgs),
    /// Print the manual page
    Man,
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

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The instance, as named in instances.tsv
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    /// Start although the pathway may not be in place
    #[arg(long)]
    pub no_check: bool,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroUsize>,
    /// How long open connections may go on after SIGTERM, such as 30s, 500ms or 2m; a second signal ends them at once
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = drain_timeout)]
    pub drain_timeout: Duration,
}

fn drain_timeout(text: &str) -> Result<Duration, ValueError> {
    match text {
        "0" | "0s" => Ok(Duration::ZERO),
        text => parse_duration(text),
    }
}

/// `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// The relay to connect to, ADDR:PORT
    #[arg(value_name = "ADDR:PORT")]
    pub relay: std::net::SocketAddr,
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
