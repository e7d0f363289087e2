//! One cell of the table: a fresh namespace, the service, a relay, one row's load, the figures.
//!
//! Owns: the life of a relay under test and what a row's figures are made of. Must not know: how rows,
//! rounds and programs are ordered, or what the report looks like.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::clients;
use crate::echo::{Echo, WHO};
use crate::load::{self, Failures, Target, Traffic, Work, exchange};
use crate::namespace::Namespace;
use crate::programs::{Program, Route};
use crate::usage::{self, Holdings};

/// Both below the first announced port (1024): no spoofed socket can meet a listener's port.
const RELAY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 700);
const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 701);

/// Idle connections are opened, and checked, so many at a time.
const AT_A_TIME: usize = 50;

/// A kind of load. UDP rows would be further variants, with a service and a load of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Row {
    /// Bulk echo
    Bulk,
    /// Request and response of 64 bytes
    Exchange,
    /// Connect, one exchange, reset
    Connect,
    /// Connections that do nothing
    Idle,
}

/// A line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Figure {
    BulkRate,
    BulkCpu,
    ExchangeRate,
    ExchangeP99,
    ExchangeCpu,
    ConnectRate,
    ConnectP99,
    ConnectCpu,
    IdleMemory,
    IdleDescriptors,
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    /// Load before the window, and how long an idle relay may settle.
    pub(crate) warmup: Duration,
    /// The window of a timed row.
    pub(crate) window: Duration,
    /// Connections of the timed rows.
    pub(crate) connections: usize,
    /// Connections of the idle row.
    pub(crate) idle: usize,
    /// Threads of the load.
    pub(crate) threads: usize,
    /// Threads of the echo service.
    pub(crate) service_threads: usize,
    /// Threads of the relay.
    pub(crate) relay_threads: usize,
}

/// What one cell showed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    /// Meaningless unless `failures` is empty.
    pub(crate) figures: BTreeMap<Figure, f64>,
    /// What went wrong.
    pub(crate) failures: Failures,
    /// Share of the machine (0 to 1) that others used meanwhile; `None` where no time was measured.
    pub(crate) foreign: Option<f64>,
    /// Whether the service saw the announced port too.
    pub(crate) keeps_port: bool,
}

/// Measures one cell. Whatever goes wrong with the relay is in [`Sample::failures`].
///
/// # Errors
/// When the harness itself cannot work: no root, no namespace, no service.
pub(crate) fn measure(
    program: Program,
    row: Row,
    connmark: bool,
    extent: Extent,
) -> Result<Sample> {
    settle(extent.warmup)?;
    let stand = Stand::new(program, connmark, extent)?;
    let mut sample = Sample::default();
    match stand.ready().and_then(|keeps_port| {
        sample.keeps_port = keeps_port;
        match row {
            Row::Bulk => stand.timed(Work::Bulk, &mut sample),
            Row::Exchange => stand.timed(Work::Exchange, &mut sample),
            Row::Connect => stand.timed(Work::Connect, &mut sample),
            Row::Idle => stand.idle(&mut sample),
        }
    }) {
        Ok(()) => {}
        Err(error) => sample.failures.add(format!("{error:#}")),
    }
    if let Err(error) = stand.still_runs() {
        sample.failures.add(format!("{error:#}"));
    }
    Ok(sample)
}

/// A namespace with the service and a relay in it.
pub(crate) struct Stand {
    program: Program,
    extent: Extent,
    relay: Option<Relay>,
    echo: Echo,
    namespace: Namespace,
    scratch: tempfile::TempDir,
}

struct Relay {
    child: std::cell::RefCell<Child>,
    pid: u32,
    log: PathBuf,
}

impl Stand {
    /// Starts everything; [`Stand::ready`] waits for it.
    ///
    /// # Errors
    /// When the namespace cannot be made or a program cannot be started.
    pub(crate) fn new(program: Program, connmark: bool, extent: Extent) -> Result<Self> {
        let namespace = Namespace::new(connmark)?;
        let scratch = tempfile::tempdir().context("cannot make a scratch directory")?;
        let echo = Echo::start(&namespace, SERVICE, extent.service_threads)?;
        let route = Route {
            listen: RELAY,
            service: SERVICE,
            threads: extent.relay_threads,
            // HAProxy reserves five descriptors for every two connections where it may splice
            room: (crate::descriptors()? / 3).min(40_000),
        };
        let relay = match program.command(&namespace, scratch.path(), route)? {
            None => None,
            Some(mut command) => {
                let log = scratch.path().join("relay.log");
                let out = File::create(&log).context("cannot create the relay's log")?;
                let child = command
                    .stdout(out.try_clone().context("cannot share the relay's log")?)
                    .stderr(out)
                    .spawn()
                    .with_context(|| format!("cannot start {}", program.title()))?;
                let pid = child.id();
                Some(Relay {
                    child: child.into(),
                    pid,
                    log,
                })
            }
        };
        Ok(Self {
            program,
            extent,
            relay,
            echo,
            namespace,
            scratch,
        })
    }

    /// The namespace of all of them.
    pub(crate) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A directory that goes with the stand.
    pub(crate) fn dir(&self) -> &std::path::Path {
        self.scratch.path()
    }

    /// Where the load goes.
    pub(crate) fn target(&self) -> Target {
        let announce = self.relay.is_some();
        let address = if announce { RELAY } else { SERVICE };
        Target { address, announce }
    }

    /// The relay's processes; none in the direct row.
    ///
    /// # Errors
    /// When `/proc` cannot be listed.
    pub(crate) fn relay_processes(&self) -> Result<Vec<u32>> {
        self.relay
            .as_ref()
            .map_or(Ok(Vec::new()), |relay| usage::tree(relay.pid))
    }

    /// Waits until the service answers through the relay and says that it sees the announced client.
    /// Returns whether it sees the announced port too.
    ///
    /// # Errors
    /// When it does not within ten seconds, or sees someone else: then no figure would mean anything.
    pub(crate) fn ready(&self) -> Result<bool> {
        let target = self.target();
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let client = clients::next();
            let answer = self.namespace.enter(|| who_am_i(target, client));
            match answer {
                Ok(SocketAddr::V4(seen)) if !target.announce || seen.ip() == client.ip() => {
                    return Ok(seen.port() == client.port());
                }
                Ok(seen) => bail!("the service sees {seen} instead of {client}"),
                Err(error) => {
                    self.still_runs()?;
                    if Instant::now() > end {
                        return Err(error.context("not ready after ten seconds"));
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// # Errors
    /// When the relay has ended, with what it wrote about it.
    pub(crate) fn still_runs(&self) -> Result<()> {
        let Some(relay) = &self.relay else {
            return Ok(());
        };
        let status = relay
            .child
            .borrow_mut()
            .try_wait()
            .context("cannot wait for the relay")?;
        let Some(status) = status else { return Ok(()) };
        let log = fs::read_to_string(&relay.log).unwrap_or_default();
        let mut lines = log.lines().filter(|line| !line.trim().is_empty());
        let telling = |line: &&str| {
            let line = line.to_ascii_lowercase();
            line.contains("error") || line.contains("alert")
        };
        let told = lines.clone().find(telling).or_else(|| lines.next_back());
        let told = told.unwrap_or("it wrote nothing");
        bail!("{} ended ({status}): {told}", self.program.title());
    }

    /// Load of the given kind, with the CPU time of the relay's threads over the window.
    ///
    /// # Errors
    /// As [`load::run`].
    pub(crate) fn load<P>(
        &self,
        work: Work,
        connections: usize,
        probe: impl FnMut() -> Result<P>,
    ) -> Result<load::Outcome<P>> {
        let traffic = Traffic {
            connections,
            threads: self.extent.threads.min(connections),
            warmup: self.extent.warmup,
            window: self.extent.window,
        };
        load::run(&self.namespace, self.target(), traffic, work, probe)
    }

    fn timed(&self, work: Work, sample: &mut Sample) -> Result<()> {
        let relay = self.relay_processes()?;
        let others = [std::process::id(), self.echo.pid()];
        let outcome = self.load(work, self.extent.connections, || {
            let busy = usage::machine_busy()?;
            Ok((usage::cpu_time(&relay)?, usage::cpu_time(&others)?, busy))
        })?;
        let (begin, end) = outcome.probes;
        let relay_cpu = (end.0 - begin.0).as_secs_f64();
        let ours = relay_cpu + (end.1 - begin.1).as_secs_f64();
        let window = outcome.window.as_secs_f64();
        let cores = cores() as f64;
        let foreign = (end.2.saturating_sub(begin.2).as_secs_f64() - ours) / (window * cores);
        sample.foreign = Some(foreign.clamp(0.0, 1.0));
        sample.failures.merge(outcome.failures);
        if outcome.units == 0 {
            sample.failures.add("nothing was done in the window");
            return Ok(());
        }
        let units = outcome.units as f64;
        let rate = units / window;
        let cpu = relay_cpu / units;
        let p99 = outcome
            .latencies
            .quantile(0.99)
            .unwrap_or_default()
            .as_secs_f64()
            * 1e6;
        sample.figures = match work {
            Work::Bulk => [
                (Figure::BulkRate, rate * 8.0 / 1e9),
                (Figure::BulkCpu, cpu * 1e9),
            ]
            .into(),
            Work::Exchange => [
                (Figure::ExchangeRate, rate),
                (Figure::ExchangeP99, p99),
                (Figure::ExchangeCpu, cpu * 1e6),
            ]
            .into(),
            Work::Connect => [
                (Figure::ConnectRate, rate),
                (Figure::ConnectP99, p99),
                (Figure::ConnectCpu, cpu * 1e6),
            ]
            .into(),
        };
        if self.relay.is_none() {
            let nobody = [Figure::BulkCpu, Figure::ExchangeCpu, Figure::ConnectCpu];
            sample.figures.retain(|figure, _| !nobody.contains(figure));
        }
        Ok(())
    }

    fn idle(&self, sample: &mut Sample) -> Result<()> {
        let settle = self.extent.warmup.max(Duration::from_millis(500));
        let number = self.extent.idle;
        let target = self.target();
        let relay = self.relay_processes()?;
        std::thread::sleep(settle);
        let before = usage::holdings(&relay)?;
        let mut held = self
            .namespace
            .enter(|| exchange::hold(target, number, AT_A_TIME))?;
        std::thread::sleep(settle);
        // a process that was started meanwhile is the relay's too
        let after = usage::holdings(&self.relay_processes()?)?;
        held.check(AT_A_TIME)?;
        if self.relay.is_some() {
            let each =
                |of: fn(&Holdings) -> u64| (of(&after) as f64 - of(&before) as f64) / number as f64;
            sample.figures = [
                (Figure::IdleMemory, each(|holdings| holdings.pss)),
                (
                    Figure::IdleDescriptors,
                    each(|holdings| holdings.descriptors),
                ),
            ]
            .into();
        }
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // its own process group: nginx's workers go with their master. Fails only when all are gone.
        let _ = killpg(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
        let _ = self.child.get_mut().wait();
    }
}

/// How many CPUs there are for this process.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Waits until the machine is quiet: the kernel tears the last namespace down in the background. At most a
/// few warm-ups long: who else is there shows in [`Sample::foreign`].
fn settle(warmup: Duration) -> Result<()> {
    let end = Instant::now() + 3 * warmup;
    let step = Duration::from_millis(100);
    while Instant::now() < end {
        let before = usage::machine_busy()?;
        std::thread::sleep(step);
        let busy = usage::machine_busy()?.saturating_sub(before);
        if busy.as_secs_f64() < 0.1 * step.as_secs_f64() * cores() as f64 {
            break;
        }
    }
    Ok(())
}

fn who_am_i(target: Target, client: SocketAddrV4) -> Result<SocketAddr> {
    let limit = Duration::from_secs(2);
    let mut stream = TcpStream::connect_timeout(&target.address.into(), limit)
        .with_context(|| format!("cannot connect to {}", target.address))?;
    stream
        .set_read_timeout(Some(limit))
        .context("cannot set a time limit")?;
    let mut message = Vec::new();
    if target.announce {
        clients::announce(&mut message, client, target.address);
    }
    message.extend_from_slice(WHO);
    stream
        .write_all(&message)
        .context("cannot ask who the service sees")?;
    let mut answer = [0; 64];
    let count = stream
        .read(&mut answer)
        .context("no answer through the relay")?;
    let text = std::str::from_utf8(&answer[..count]).context("the answer is not text")?;
    text.parse()
        .with_context(|| format!("the answer '{text}' is not an address"))
}
