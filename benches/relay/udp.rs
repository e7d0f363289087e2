//! The UDP rows: an echo of 100 bytes through a relay, with 1, 50 and 500 clients.
//!
//! Owns: which cells are measured, in which order, and a cell's life: namespace, service, relay, load.
//! Must not know: how datagrams are sent, or what the report looks like.
//!
//! - Each client has a socket of its own towards the relay, because not every relay tells clients apart that
//!   share a proxy's port; whether it does is asked beforehand and said in the report.
//! - A closed loop: each client keeps so many datagrams under way, an answer is followed by the next question.
//!   What is not answered in time counts as lost and is asked anew.
//! - Load and service make one system call per datagram, as most programs do; the service has 4 MB of receive
//!   buffer, as DNS servers have. Loss is shown for the direct row, too.
//! - The first three rows have the loads at which the peers showed what they showed when the goals were set:
//!   500 × 8 is where they lose a fifth, because so many datagrams do not fit the buffers of their sockets.
//! - A cell that others disturbed is measured again, whatever it showed: an idle processor of a virtual machine
//!   that has to wait for its host to wake it costs whoever waits for one most.
//! - 500 clients with one datagram each is what a DNS server has: nothing can be sent together, and a relay
//!   does the kernel's whole work per datagram twice again. The other rows are flows with several under way.

mod echo;
mod load;
mod programs;
mod report;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

pub(crate) use self::echo::serve;
use self::load::{Outcome, Target, Traffic};
use crate::cell::{Extent, cores};
use crate::namespace::Namespace;
use crate::programs::Program;
use crate::report::Setting;
use crate::usage;

/// Both below the first announced port (1024): no spoofed socket can meet a listener's port.
const RELAY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 700);
const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 701);

/// How many clients, and how many datagrams each of them has under way.
const ROWS: [Row; 5] = [(1, 64), (50, 16), (500, 8), (500, 4), (500, 1)];

/// The programs that can do UDP at all.
const PROGRAMS: [Program; 4] = [
    Program::Direct,
    Program::Mmproxyctl,
    Program::GoMmproxy,
    Program::Mmproxy,
];

/// Beyond this share of the machine (0 to 1) used by others, the time that a virtual machine's host took from
/// it among it, a cell is measured again.
const DISTURBED: f64 = 0.05;

/// How often at most.
const TRIES: u32 = 4;

/// How long a relay may take until it answers.
const READY: Duration = Duration::from_secs(3);

/// What one cell showed.
#[derive(Debug, Clone, Default)]
struct Sample {
    /// Answers per second.
    rate: f64,
    /// Share of the questions (0 to 1) that were not answered in time.
    loss: f64,
    /// The time that 99 % of the answers took at most, µs.
    p99: f64,
    /// CPU time of the relay, µs per question and its answer; `None` without a relay.
    cpu: Option<f64>,
    /// Share of the machine (0 to 1) that others used meanwhile.
    foreign: f64,
}

/// What a program showed in one row.
#[derive(Debug, Clone, Default)]
struct Cell {
    samples: Vec<Sample>,
    /// Why there is no figure.
    failure: Option<String>,
}

/// What is known of a program beside figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// Clients that share a proxy's port are told apart.
    Apart,
    /// The second one is taken for the first.
    Mixed,
}

/// Clients, and datagrams under way of each.
pub(crate) type Row = (usize, usize);

/// All cells, by row and program.
#[derive(Debug, Default)]
struct Results {
    cells: BTreeMap<(Row, Program), Cell>,
    sharing: BTreeMap<Program, Sharing>,
}

/// The rows that are wanted: those of the table, or each number of clients with each number under way.
///
/// # Errors
/// When there is none, or one without load.
pub(crate) fn rows(clients: &[usize], under_way: &[usize]) -> Result<Vec<Row>> {
    let rows: Vec<Row> = match under_way {
        [] => ROWS
            .into_iter()
            .filter(|(row, _)| clients.is_empty() || clients.contains(row))
            .collect(),
        _ if clients.is_empty() => bail!("--under-way needs --clients"),
        _ => clients
            .iter()
            .flat_map(|&clients| under_way.iter().map(move |&each| (clients, each)))
            .collect(),
    };
    if rows.is_empty() || rows.iter().any(|&(clients, each)| clients * each == 0) {
        bail!("--clients is 1, 50 or 500, or anything with --under-way");
    }
    Ok(rows)
}

/// Measures the UDP rows and writes udp.json, udp.md and udp.svg.
///
/// # Errors
/// When the harness itself cannot work: no root, no namespace, no service.
pub(crate) fn run(
    rows: &[Row],
    programs: &[Program],
    rounds: u32,
    extent: Extent,
    out: &Path,
) -> Result<()> {
    let programs = installed(programs)?;
    let mut results = Results::default();
    for round in 0..rounds {
        for &(clients, each) in rows {
            let mut order = programs.clone();
            order.rotate_left(round as usize % programs.len());
            for (program, _) in order {
                let key = ((clients, each), program);
                if results
                    .cells
                    .get(&key)
                    .is_some_and(|cell| cell.failure.is_some())
                {
                    continue;
                }
                let traffic = Traffic {
                    clients,
                    each,
                    threads: extent.threads.min(clients),
                    warmup: extent.warmup,
                    window: extent.window,
                };
                let outcome = quietest(program, extent, traffic, &mut results.sharing)?;
                let cell = results.cells.entry(key).or_default();
                let said = match outcome {
                    Ok(sample) => {
                        let said = report::line(&sample);
                        cell.samples.push(sample);
                        said
                    }
                    Err(error) => {
                        cell.failure = Some(format!("{error:#}"));
                        format!("FAILED: {error:#}")
                    }
                };
                eprintln!(
                    "round {}/{rounds} {clients:>3} clients × {each:<2} {:<11} {said}",
                    round + 1,
                    program.title()
                );
            }
        }
    }
    let setting = Setting::here(extent, rounds, vec![false], Vec::new(), programs)?;
    report::write(out, &setting, rows, &results)?;
    println!("{}", report::to_text(&setting, rows, &results));
    println!("written to {}: udp.json, udp.md, udp.svg", out.display());
    Ok(())
}

/// The figures of a cell while others left the machine alone; of the least disturbed try where they never do.
///
/// # Errors
/// When the harness itself cannot work; what the program did is the result within.
fn quietest(
    program: Program,
    extent: Extent,
    traffic: Traffic,
    sharing: &mut BTreeMap<Program, Sharing>,
) -> Result<Result<Sample>> {
    let mut best: Option<Sample> = None;
    for _ in 0..TRIES {
        let sample = match Stand::new(program, extent)?.measure(traffic, sharing) {
            Ok(sample) => sample,
            failed => return Ok(failed),
        };
        if best
            .as_ref()
            .is_none_or(|best| sample.foreign < best.foreign)
        {
            best = Some(sample);
        }
        if best.as_ref().is_some_and(|best| best.foreign <= DISTURBED) {
            break;
        }
    }
    Ok(best.context("nothing was measured"))
}

fn installed(wanted: &[Program]) -> Result<Vec<(Program, String)>> {
    let mut programs = Vec::new();
    for program in PROGRAMS {
        if !wanted.is_empty() && !wanted.contains(&program) {
            continue;
        }
        match program.version() {
            Ok(version) => programs.push((program, version)),
            Err(error) if wanted.is_empty() => eprintln!("left out: {error:#}"),
            Err(error) => return Err(error),
        }
    }
    match programs.len() {
        0 => bail!("none of the programs does UDP: direct, mmproxyctl, go-mmproxy, mmproxy do"),
        _ => Ok(programs),
    }
}

/// A namespace with the service and a relay in it. Fields are dropped in this order.
struct Stand {
    program: Program,
    relay: Option<Relay>,
    echo: echo::Echo,
    namespace: Namespace,
    _scratch: tempfile::TempDir,
}

struct Relay {
    child: Child,
    log: PathBuf,
}

impl Drop for Relay {
    fn drop(&mut self) {
        // both fail only when it is gone already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Stand {
    fn new(program: Program, extent: Extent) -> Result<Self> {
        let namespace = Namespace::new(false)?;
        let scratch = tempfile::tempdir().context("cannot make a scratch directory")?;
        let echo = echo::Echo::start(&namespace, SERVICE, extent.service_threads)?;
        let command = programs::command(program, &namespace, scratch.path(), extent.relay_threads)?;
        let relay = match command {
            None => None,
            Some(mut command) => {
                let log = scratch.path().join("relay.log");
                let file = File::create(&log).context("cannot create the relay's log")?;
                let child = command
                    .stdout(file.try_clone().context("cannot share the relay's log")?)
                    .stderr(file)
                    .spawn()
                    .with_context(|| format!("cannot start {}", program.title()))?;
                Some(Relay { child, log })
            }
        };
        Ok(Self {
            program,
            relay,
            echo,
            namespace,
            _scratch: scratch,
        })
    }

    fn target(&self) -> Target {
        match self.relay {
            Some(_) => Target {
                address: RELAY,
                announce: true,
            },
            None => Target {
                address: SERVICE,
                announce: false,
            },
        }
    }

    /// One cell's figures.
    ///
    /// # Errors
    /// When the relay does not answer, shows the service somebody else, ends, or nothing comes back.
    fn measure(
        mut self,
        traffic: Traffic,
        sharing: &mut BTreeMap<Program, Sharing>,
    ) -> Result<Sample> {
        let result = self.ready().and_then(|()| {
            if self.relay.is_some() && !sharing.contains_key(&self.program) {
                let target = self.target();
                let apart = self.namespace.enter(|| load::tells_apart(target))?;
                let known = if apart {
                    Sharing::Apart
                } else {
                    Sharing::Mixed
                };
                sharing.insert(self.program, known);
            }
            self.load(traffic)
        });
        // why a relay does not answer is best said by what it wrote before it ended
        self.still_runs()?;
        result
    }

    fn ready(&mut self) -> Result<()> {
        let target = self.target();
        let end = Instant::now() + READY;
        loop {
            match self.namespace.enter(|| load::who_am_i(target)) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.still_runs()?;
                    if Instant::now() > end {
                        return Err(error.context(format!("not ready after {READY:?}")));
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    fn still_runs(&mut self) -> Result<()> {
        let Some(relay) = &mut self.relay else {
            return Ok(());
        };
        let status = relay
            .child
            .try_wait()
            .context("cannot wait for the relay")?;
        let Some(status) = status else { return Ok(()) };
        let log = fs::read_to_string(&relay.log).unwrap_or_default();
        let telling = |line: &&str| line.contains("error") || line.contains("panic");
        let told = log.lines().find(telling).or_else(|| log.lines().next());
        bail!("it ended ({status}): {}", told.unwrap_or("without a word"));
    }

    fn load(&self, traffic: Traffic) -> Result<Sample> {
        let relay = match &self.relay {
            Some(relay) => usage::tree(relay.child.id())?,
            None => Vec::new(),
        };
        let others = [std::process::id(), self.echo.pid()];
        let outcome = load::run(&self.namespace, self.target(), traffic, || {
            let busy = usage::machine_busy()?;
            Ok((usage::cpu_time(&relay)?, usage::cpu_time(&others)?, busy))
        })?;
        let Outcome {
            answers,
            lost,
            window,
            latencies,
            probes: (begin, end),
        } = outcome;
        if answers == 0 {
            bail!("no answer in the window");
        }
        let relay_cpu = (end.0 - begin.0).as_secs_f64();
        let ours = relay_cpu + (end.1 - begin.1).as_secs_f64();
        let seconds = window.as_secs_f64();
        let busy = end.2.saturating_sub(begin.2).as_secs_f64();
        let p99 = latencies.quantile(0.99).unwrap_or_default();
        Ok(Sample {
            rate: answers as f64 / seconds,
            loss: lost as f64 / (answers + lost) as f64,
            p99: p99.as_secs_f64() * 1e6,
            cpu: (!relay.is_empty()).then(|| relay_cpu * 1e6 / answers as f64),
            foreign: ((busy - ours) / (seconds * cores() as f64)).clamp(0.0, 1.0),
        })
    }
}
