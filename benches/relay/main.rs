//! The benchmark: mmproxyctl, its peers and a direct connection, each in a fresh network namespace with the
//! same kernel state. Run as root, after benches/install-peers.sh:
//!
//! ```text
//! cargo bench --bench relay                          # everything; half an hour
//! cargo bench --bench relay -- --quick               # does it work? figures mean nothing
//! cargo bench --bench relay -- --rows connect --programs direct,mmproxyctl,haproxy --connmark off
//! cargo bench --bench relay -- --syscalls            # strace -c, calls per connection
//! cargo bench --bench relay -- --spread              # CPU time by worker thread
//! cargo bench --bench relay -- --udp                 # the UDP rows: udp.json, udp.md, udp.svg
//! ```
//!
//! Writes relay.json, relay.md and relay.svg to `--out`. What is measured, and how:
//!
//! - The load and the echo service are epoll loops of this program ([`load`], [`echo`]); the service is a
//!   process of its own. The direct row is the same load without a relay and without a header.
//! - A round measures every row of every program once, and the next round begins with another program, so
//!   that drift of the machine meets all alike. Medians of the rounds are shown; rates also as the median of
//!   the rounds' ratios to the direct connection.
//! - Each announced client has an address and port of its own ([`clients`]). Before a cell is measured the
//!   service must say that it sees the announced address.
//! - Answers are compared. One failure in any round and the cell shows no figure.
//! - Bulk counts bytes that came back, once. CPU time is user + system of all the relay's processes over the
//!   window, per unit of work. Idle memory is the growth of PSS, divided by the connections.

mod cell;
mod clients;
mod echo;
mod histogram;
mod load;
mod namespace;
mod programs;
mod report;
mod results;
mod spread;
mod syscalls;
mod udp;
mod usage;

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use cell::{Extent, Row};
use programs::Program;
use report::Setting;
use results::{Connmark, Results};

/// Descriptors that every program is given, where the hard limit or root's capabilities allow: 20,000 idle
/// connections through a relay that holds pipes for each.
const DESCRIPTORS: u64 = 262_144;

/// Compares relays with each other and with a direct connection
#[derive(Debug, Parser)]
#[command(name = "relay", max_term_width = 100)]
struct Options {
    /// What is measured [default: all]
    #[arg(long, value_delimiter = ',', value_name = "ROW")]
    rows: Vec<Row>,
    /// What is compared [default: all that is installed]
    #[arg(long, value_delimiter = ',', value_name = "PROGRAM")]
    programs: Vec<Program>,
    /// How often each cell is measured [default: 5, quick: 1]
    #[arg(long)]
    rounds: Option<u32>,
    /// The window of a timed cell [default: 4, quick: 0.5]
    #[arg(long)]
    seconds: Option<f64>,
    /// Connections of the timed rows
    #[arg(long, default_value_t = 50)]
    connections: usize,
    /// Connections of the idle row [default: a seventh of the descriptor limit, at most 10000; quick: 500]
    #[arg(long)]
    idle: Option<usize>,
    /// Threads of the load [default: one per core]
    #[arg(long)]
    threads: Option<usize>,
    /// Threads of the echo service [default: one per core]
    #[arg(long)]
    service_threads: Option<usize>,
    /// Threads, worker processes or listeners of the relays [default: one per core]
    #[arg(long)]
    relay_threads: Option<usize>,
    /// Whether the namespaces have the pathway's CONNMARK rules
    #[arg(long, default_value = "both")]
    connmark: ConnmarkChoice,
    /// Short: shows that everything works, figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Where the results are written
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"))]
    out: PathBuf,
    /// Count system calls per connection instead (default programs: mmproxyctl, haproxy)
    #[arg(long, conflicts_with = "spread")]
    syscalls: bool,
    /// Show how evenly the relay's threads are used instead (default program: mmproxyctl)
    #[arg(long)]
    spread: bool,
    /// Measure the UDP rows instead: an echo of 100 bytes
    #[arg(long, conflicts_with_all = ["syscalls", "spread", "rows"])]
    udp: bool,
    /// Clients of the UDP rows [default: 1,50,500]
    #[arg(long, requires = "udp", value_delimiter = ',', value_name = "NUMBER")]
    clients: Vec<usize>,
    /// Datagrams that each of them keeps under way [default: a row for each load of the table]
    #[arg(long, requires = "udp", value_delimiter = ',', value_name = "NUMBER")]
    under_way: Vec<usize>,
    /// Be the echo service
    #[arg(long, hide = true, value_name = "ADDR:PORT")]
    echo: Option<SocketAddrV4>,
    /// Be the UDP echo service
    #[arg(long, hide = true, value_name = "ADDR:PORT")]
    udp_echo: Option<SocketAddrV4>,
    /// What cargo bench passes to every harness
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ConnmarkChoice {
    /// No: connmark=auto with a loopback target
    Off,
    /// Yes: connection tracking for everyone, the direct row included
    On,
    /// One table each
    Both,
}

fn main() -> Result<()> {
    let options = Options::parse();
    raise_descriptor_limit()?;
    let extent = options.extent()?;
    if let Some(address) = options.echo {
        return echo::serve(address, extent.service_threads);
    }
    if let Some(address) = options.udp_echo {
        return udp::serve(address, extent.service_threads);
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("the benchmark builds network namespaces: run it as root");
    }
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 5 });
    if options.syscalls {
        let usual = [Program::Mmproxyctl, Program::Haproxy];
        return syscalls::run(options.programs_or(&usual), extent);
    }
    if options.spread {
        return spread::run(options.programs_or(&[Program::Mmproxyctl]), rounds, extent);
    }
    if options.udp {
        let rows = udp::rows(&options.clients, &options.under_way)?;
        return udp::run(&rows, &options.programs, rounds, extent, &options.out);
    }
    let connmarks = match options.connmark {
        ConnmarkChoice::Off => vec![false],
        ConnmarkChoice::On => vec![true],
        ConnmarkChoice::Both => vec![false, true],
    };
    let rows = if options.rows.is_empty() {
        Row::value_variants()
    } else {
        &options.rows
    };
    let programs = options.installed()?;
    let setting = Setting::here(extent, rounds, connmarks, rows.to_vec(), programs)?;
    let results = measure_all(&setting)?;
    report::write(&options.out, &setting, &results)?;
    println!("{}", report::to_text(&setting, &results));
    println!(
        "written to {}: relay.json, relay.md, relay.svg",
        options.out.display()
    );
    Ok(())
}

fn measure_all(setting: &Setting) -> Result<Results> {
    let mut results = Results::default();
    for round in 0..setting.rounds {
        for &connmark in &setting.connmarks {
            for &row in &setting.rows {
                if !has_meaning(row, connmark, setting) {
                    continue;
                }
                let mut order = setting.programs.clone();
                order.rotate_left(round as usize % setting.programs.len());
                for (program, _) in order {
                    if row == Row::Idle && program == Program::Direct {
                        continue;
                    }
                    let sample = cell::measure(program, row, connmark, setting.extent)
                        .with_context(|| format!("{}, {row:?}", program.title()))?;
                    eprintln!(
                        "{}",
                        progress(setting, round, connmark, row, program, &sample)
                    );
                    results.add(connmark, row, program, sample);
                }
            }
        }
    }
    Ok(results)
}

/// Connection tracking keeps its entries in the kernel: a relay's own memory is measured once.
fn has_meaning(row: Row, connmark: Connmark, setting: &Setting) -> bool {
    row != Row::Idle || !connmark || !setting.connmarks.contains(&false)
}

fn progress(
    setting: &Setting,
    round: u32,
    connmark: Connmark,
    row: Row,
    program: Program,
    sample: &cell::Sample,
) -> String {
    let shown: Vec<String> = row
        .figures()
        .iter()
        .filter_map(|figure| {
            let value = sample.figures.get(figure)?;
            Some(format!(
                "{} {}",
                figure.title().trim_start_matches("… "),
                figure.show(*value)
            ))
        })
        .collect();
    let failed: Vec<String> = sample
        .failures
        .0
        .iter()
        .map(|(kind, count)| format!("FAILED: {kind} ({count} times)"))
        .collect();
    let foreign = sample.foreign.map_or_else(String::new, |share| {
        format!(" [others' CPU {:.0} %]", share * 100.0)
    });
    format!(
        "round {}/{} connmark {} {:<15} {}{foreign}",
        round + 1,
        setting.rounds,
        if connmark { "on " } else { "off" },
        program.title(),
        [failed, shown].concat().join("; "),
    )
}

impl Options {
    fn extent(&self) -> Result<Extent> {
        let cores = cell::cores();
        let seconds = self.seconds.unwrap_or(if self.quick { 0.5 } else { 4.0 });
        let window = Duration::try_from_secs_f64(seconds).context("--seconds is not a time")?;
        let extent = Extent {
            warmup: if self.quick {
                Duration::from_millis(200)
            } else {
                Duration::from_secs(1)
            },
            window,
            connections: self.connections,
            // a relay with a pipe each way has six descriptors a connection
            idle: match self.idle {
                Some(idle) => idle,
                None if self.quick => 500,
                None => (descriptors()? / 7).min(10_000),
            },
            threads: self.threads.unwrap_or(cores),
            service_threads: self.service_threads.unwrap_or(cores),
            relay_threads: self.relay_threads.unwrap_or(cores),
        };
        let least = [
            extent.connections,
            extent.idle,
            extent.threads,
            extent.service_threads,
            extent.relay_threads,
        ];
        if least.contains(&0) || window.is_zero() || self.rounds == Some(0) {
            bail!("rounds, seconds, connections and threads are at least 1");
        }
        // one address to one address: the ephemeral ports are the limit
        if extent.idle > 28_000 {
            bail!("--idle is at most 28000: the load has one address");
        }
        Ok(extent)
    }

    fn programs_or<'a>(&'a self, usual: &'a [Program]) -> &'a [Program] {
        if self.programs.is_empty() {
            usual
        } else {
            &self.programs
        }
    }

    /// What is wanted, with versions. What was named must be there; of all, what is missing is said.
    fn installed(&self) -> Result<Vec<(Program, String)>> {
        let mut programs = Vec::new();
        for &program in self.programs_or(Program::value_variants()) {
            match program.version() {
                Ok(version) => programs.push((program, version)),
                Err(error) if self.programs.is_empty() => eprintln!("left out: {error:#}"),
                Err(error) => return Err(error),
            }
        }
        Ok(programs)
    }
}

/// Raises the limit as far as it goes; children inherit it. Root cannot raise the hard limit without
/// CAP_SYS_RESOURCE, which containers often lack.
fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the descriptor limit")?;
    let wanted = DESCRIPTORS.max(hard);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted)
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
        .context("cannot raise the descriptor limit")
}

/// What this process and its children may open.
pub(crate) fn descriptors() -> Result<usize> {
    let (soft, _) =
        getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the descriptor limit")?;
    // some systems say "infinity"; arrays are made by this number
    Ok(usize::try_from(soft.min(4 * DESCRIPTORS))?)
}
