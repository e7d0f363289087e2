//! `run`: relays in the foreground, from their lines in instances.tsv to a drained end.
//!
//! The process's own thread looks after the relays, answers the control socket and speaks with systemd;
//! connections live on the worker threads.

mod fleet;
mod handover;
mod plan;
mod relay;
mod view;
mod watch;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use serde::Serialize;
use tokio::runtime::{Builder, LocalOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{debug, error, info, warn};

use self::fleet::{Fleet, ReloadError, Selection};
use self::handover::{Answer, Estate, Inheritance, Successor};
use self::relay::{World, lock_name};
use self::view::View;
use self::watch::Watch;
use super::{UsageError, drawn};
use crate::cli::{Global, RunArgs};
use crate::config::{self, Configuration};
use crate::control::messages::{Request, Response};
use crate::control::{client, server};
use crate::relay::counters::Totals;
use crate::relay::udp::counters as udp;
use crate::relay::workers::Workers;
use crate::resolve::Resolver;
use crate::runtime_dir::{Attempt, Lock, RuntimeDir};
use crate::socket;
use crate::socket::listening::Listening;
use crate::supervisor::Task;
use crate::systemd;

/// How often systemd is asked for more patience while a relay cannot listen, and for how much.
const STILL_STARTING: Duration = Duration::from_secs(10);

/// The lock and the control socket of a process that runs all instances; no instance's name ends so.
const ALL: &str = "all.process";

/// Runs the verb.
pub(super) fn run(global: &Global, args: RunArgs) -> anyhow::Result<ExitCode> {
    // before anything else is opened: both come as numbers of descriptors
    let inheritance = handover::receive_all()?;
    let passed = systemd::passed().context("cannot take the sockets that systemd passed")?;
    let answer = inheritance.as_ref().map(Inheritance::answer).transpose()?;
    match start(global, args, inheritance, passed) {
        Ok(Some(process)) => process.run(answer),
        Ok(None) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            if let Some(answer) = answer {
                answer.failed(&format!("{error:#}"))?;
            }
            Err(error)
        }
    }
}

/// Everything that needs no event loop, or `None` where another process does it already.
fn start(
    global: &Global,
    args: RunArgs,
    inheritance: Option<Inheritance>,
    passed: Vec<systemd::Passed>,
) -> anyhow::Result<Option<Process>> {
    // the file may be replaced while we run, and /proc/self/exe then names one that is gone
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let configuration = config::load(&global.config_dir)?;
    if !configuration.warnings.is_empty() && !global.quiet {
        eprintln!("{}\n", drawn(&configuration.warnings));
    }
    let selection = select(&configuration, &args)?;
    let runtime_dir = RuntimeDir::resolve(global.runtime_dir.clone());
    let (listeners, mut locks, control) = match inheritance {
        Some(all) => (all.listeners, all.locks, all.control),
        None => (Vec::new(), BTreeMap::new(), None),
    };
    let name = match &selection {
        Selection::All => ALL.to_owned(),
        Selection::Named(names) => lock_name(names.first().map_or("", String::as_str)),
    };
    // the first of several names the process: two processes cannot both run it
    let lock = match locks.remove(&name) {
        Some(lock) => lock,
        None => match runtime_dir.try_lock(&name)? {
            Attempt::Held(lock) => lock,
            Attempt::HeldBy(pid) => {
                let pid = pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                let shown = name
                    .split_once('.')
                    .map_or("all instances", |_| match &selection {
                        Selection::All => "all instances",
                        Selection::Named(names) => &names[0],
                    });
                println!("{shown}: already running, pid {pid}");
                return Ok(None);
            }
        },
    };
    let mut held = None;
    if selection == Selection::All {
        held = Some(lock);
    } else {
        locks.insert(name.clone(), lock);
    }
    match socket::may_spoof() {
        Err(failure) if failure.errno() == Some(Errno::EPERM) => bail!(
            "relaying with the client's address needs root or CAP_NET_ADMIN (systemd: AmbientCapabilities=CAP_NET_ADMIN)"
        ),
        outcome => outcome.context("cannot make a spoofed socket")?,
    }
    raise_descriptor_limit();
    refuse_huge_pages();
    let locks = by_instance(locks);
    let inherited = match &control {
        Some(_) => locks.keys().cloned().collect(),
        None => BTreeSet::new(),
    };
    let count = args
        .workers
        .unwrap_or_else(|| std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
    let world = World {
        workers: Workers::start(count).context("cannot start the worker threads")?,
        runtime_dir,
        no_check: args.no_check,
        configuration: RefCell::new(Rc::new(configuration)),
        instances: std::cell::Cell::new(0),
        locks: RefCell::new(locks),
        offered: RefCell::default(),
        look: tokio::sync::Mutex::default(),
    };
    listeners
        .into_iter()
        .for_each(|listener| world.offer(listener));
    take_passed(&world, passed)?;
    Ok(Some(Process {
        fleet: Rc::new(Fleet::new(
            selection,
            Rc::new(world),
            global.config_dir.clone(),
            args.manage_pathways,
        )),
        args,
        program,
        name,
        lock: held,
        control,
        inherited,
    }))
}

/// Locks of instances, by the instance's name.
fn by_instance(locks: BTreeMap<String, Lock>) -> BTreeMap<String, Lock> {
    locks
        .into_iter()
        .filter_map(|(name, lock)| Some((name.strip_suffix(&lock_name(""))?.to_owned(), lock)))
        .collect()
}

fn select(configuration: &Configuration, args: &RunArgs) -> anyhow::Result<Selection> {
    if args.all {
        return Ok(Selection::All);
    }
    for name in &args.instances {
        if configuration.instance(name).is_none() {
            let known: Vec<_> = configuration
                .instances
                .iter()
                .map(|instance| instance.name.as_str())
                .collect();
            return Err(UsageError(format!(
                "no instance '{name}' in {}: there are {}",
                configuration.directory.join("instances.tsv").display(),
                if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                }
            ))
            .into());
        };
    }
    Ok(Selection::Named(args.instances.clone()))
}

/// Sockets of a socket unit, or from systemd's store, belong to the instance of their name.
fn take_passed(world: &World, passed: Vec<systemd::Passed>) -> anyhow::Result<()> {
    for systemd::Passed { name, descriptor } in passed {
        let listening = Listening::from_descriptor(descriptor)
            .with_context(|| format!("cannot use the socket that systemd passed for {name}"))?;
        let Some(listening) = listening else {
            warn!(
                name,
                "systemd passed a descriptor that is neither a listening TCP socket nor a UDP socket: closed"
            );
            systemd::forget(&name);
            continue;
        };
        let (protocol, endpoint) = listening
            .place()
            .context("a passed socket has no address")?;
        let configuration = world.configuration.borrow();
        match configuration.instance(&name) {
            Some(instance)
                if instance.options.protocol == protocol && instance.listen.has(&endpoint) =>
            {
                world.offer(listening);
            }
            Some(instance) => {
                warn!(
                    instance = name, listen = %instance.listen, passed = %endpoint, %protocol,
                    "the socket that systemd passed has another address or protocol than instances.tsv: closed"
                );
                systemd::forget(&name);
            }
            None => {
                warn!(name, passed = %endpoint, "systemd passed a socket whose name is no instance's: closed");
                systemd::forget(&name);
            }
        }
    }
    Ok(())
}

/// A process that runs relays.
struct Process {
    fleet: Rc<Fleet>,
    args: RunArgs,
    program: PathBuf,
    /// Of its lock and its control socket.
    name: String,
    /// The lock of a process that runs all instances; else it is the first instance's.
    lock: Option<Lock>,
    control: Option<std::os::unix::net::UnixListener>,
    /// The instances that the process before runs, where there is one.
    inherited: BTreeSet<String>,
}

/// How a process stops serving.
enum Stop {
    /// The signal's name.
    Signal(&'static str),
    /// Another process took over.
    Successor(Successor),
}

/// What happened to the one that looks after everything.
enum Event {
    Changed,
    Signal(&'static str),
    Reload,
    Tick,
    Files,
    Names,
    Successor(Successor),
}

impl Process {
    fn run(self, answer: Option<Answer>) -> anyhow::Result<ExitCode> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build_local(LocalOptions::default())
            .context("cannot start the runtime")?;
        runtime.block_on(async {
            // before anything else: a signal that comes during the start is not lost
            let signals = Signals::new()?;
            if let Err(error) = self.begin().await {
                if let Some(answer) = answer {
                    answer.failed(&format!("{error:#}"))?;
                }
                self.fleet.supervisor.borrow_mut().drain_all();
                return Err(error);
            }
            self.serve(signals, answer).await
        })
    }

    /// Starts the relays; fails where not a single one listens, or one that the process before runs
    /// does not: that process goes on then.
    async fn begin(&self) -> anyhow::Result<()> {
        self.fleet
            .start()
            .await
            .context("cannot install the pathways")?;
        let failing = self.fleet.failing();
        let all = self.fleet.statuses().len();
        let lost = failing.keys().any(|name| self.inherited.contains(name));
        if lost || (all > 0 && failing.len() == all) {
            let reasons: Vec<_> = failing
                .iter()
                .map(|(name, reason)| format!("instance {name}: {reason}"))
                .collect();
            bail!("{}", reasons.join("\n"));
        }
        Ok(())
    }

    async fn serve(
        mut self,
        mut signals: Signals,
        answer: Option<Answer>,
    ) -> anyhow::Result<ExitCode> {
        let (successors, mut succeeded) = mpsc::unbounded_channel();
        let control = self.control_socket()?;
        let control_again = control
            .try_clone()
            .context("cannot share the control socket")?;
        let view = View::new(Rc::clone(&self.fleet));
        let metrics = match &self.args.metrics {
            Some(endpoint) => Some(view.serve_metrics(endpoint).await?),
            None => None,
        };
        let handler = Rc::new(Handler {
            view,
            fleet: Rc::clone(&self.fleet),
            program: self.program.clone(),
            name: self.name.clone(),
            lock: self.lock.take(),
            control: control_again,
            successors,
        });
        let answering = tokio::task::spawn_local(server::serve(control, {
            let handler = Rc::clone(&handler);
            move |request| {
                let handler = Rc::clone(&handler);
                async move { handler.handle(request).await }
            }
        }));
        if let Some(answer) = answer {
            // also waits until systemd knows us: before, it would not listen
            tokio::task::spawn_blocking(move || answer.ready())
                .await
                .context("cannot answer the process before")?
                .context("cannot answer the process before")?;
        }
        let watchdog = systemd::watchdog_interval()
            .map(|every| tokio::task::spawn_local(keep_watchdog(Rc::clone(&self.fleet), every)));
        let stop = self.look_after(&mut signals, &mut succeeded).await?;
        // whoever asks from here on asks the successor, or is told that nobody runs
        answering.abort();
        if let Some(metrics) = metrics {
            metrics.abort();
        }
        let _ = answering.await;
        drop(handler);
        match stop {
            Stop::Signal(signal) => {
                self.remove_control_socket();
                self.fleet.remove_socket_files();
                systemd::notify(&[NotifyState::Stopping]);
                self.stop(&mut signals, signal).await;
                self.fleet.remove_pathways().await;
            }
            Stop::Successor(successor) => {
                if let Some(watchdog) = watchdog {
                    watchdog.abort();
                }
                self.give_way(&mut signals, successor).await;
            }
        }
        info!("ended");
        Ok(ExitCode::SUCCESS)
    }

    fn control_socket(&mut self) -> anyhow::Result<std::os::unix::net::UnixListener> {
        if let Some(inherited) = self.control.take() {
            inherited
                .set_nonblocking(true)
                .context("cannot use the control socket")?;
            return Ok(inherited);
        }
        let path = self
            .fleet
            .world
            .runtime_dir
            .file(&self.name, client::SUFFIX)?;
        server::bind(&path)
            .with_context(|| format!("cannot make the control socket {}", path.display()))
    }

    fn remove_control_socket(&self) {
        if let Ok(path) = self
            .fleet
            .world
            .runtime_dir
            .file(&self.name, client::SUFFIX)
        {
            // it may be gone with the directory; a file without a process is passed over anyway
            let _ = std::fs::remove_file(path);
        }
    }

    /// Serves until it is time to stop.
    async fn look_after(
        &self,
        signals: &mut Signals,
        succeeded: &mut mpsc::UnboundedReceiver<Successor>,
    ) -> anyhow::Result<Stop> {
        let fleet = &self.fleet;
        let watch = if self.args.watch_config {
            let watch = Watch::new().context("cannot watch the configuration")?;
            watch
                .follow(&fleet.world.configuration.borrow().clone())
                .context("cannot watch the configuration")?;
            Some(watch)
        } else {
            None
        };
        let mut changed = fleet.supervisor.borrow().subscribe();
        let mut tick = interval(STILL_STARTING);
        let mut resolved = follow_names(&fleet.resolver);
        fleet.report();
        loop {
            let event = tokio::select! {
                _ = changed.changed() => Event::Changed,
                name = signals.next() => match name {
                    HANGUP => Event::Reload,
                    name => Event::Signal(name),
                },
                Some(successor) = succeeded.recv() => Event::Successor(successor),
                Some(()) = resolved.recv() => Event::Names,
                _ = tick.tick(), if !fleet.is_ready() => Event::Tick,
                Some(told) = option(watch.as_ref().map(Watch::changed)) => {
                    told.context("cannot watch the configuration")?;
                    Event::Files
                }
            };
            match event {
                Event::Changed => fleet.report(),
                Event::Signal(name) => return Ok(Stop::Signal(name)),
                Event::Successor(successor) => return Ok(Stop::Successor(successor)),
                Event::Tick => {
                    let patience =
                        u32::try_from(3 * STILL_STARTING.as_micros()).unwrap_or(u32::MAX);
                    systemd::notify(&[NotifyState::ExtendTimeoutUsec(patience)]);
                }
                Event::Names => fleet.reresolve().await,
                // what became of it is in the log
                Event::Reload => drop(fleet.reload().await),
                Event::Files => {
                    debug!("the configuration was touched");
                    drop(fleet.reload().await);
                    if let Some(watch) = &watch {
                        let configuration = fleet.world.configuration.borrow().clone();
                        if let Err(error) = watch.follow(&configuration) {
                            error!(%error, "cannot watch all of the configuration");
                        }
                    }
                }
            }
        }
    }

    fn active(&self) -> u64 {
        self.fleet.supervisor.borrow().draining()
    }

    /// No new connections; the open ones have until the drain timeout, or until the next signal.
    async fn stop(&self, signals: &mut Signals, signal: &str) {
        let drain_timeout = self.args.drain_timeout;
        let totals = self.totals();
        self.fleet.supervisor.borrow_mut().drain_all();
        info!(
            signal,
            active = self.active(),
            ?drain_timeout,
            "stopping: no new connections"
        );
        self.drain(signals, drain_timeout).await;
        let (totals, datagrams) = totals;
        info!(
            connections = totals.accepted,
            refused = totals.refused.all(),
            connect_failed = totals.connect_failed.all(),
            bytes.r#in = totals.bytes_to_target,
            bytes.out = totals.bytes_to_client,
            "stopped"
        );
        if let Some(udp) = datagrams {
            info!(
                flows = udp.flows_opened,
                datagrams.r#in = udp.datagrams_to_target,
                datagrams.out = udp.datagrams_to_client,
                dropped = udp.dropped.all(),
                overflow.r#in = udp.overflow_from_proxy,
                overflow.out = udp.overflow_from_target,
                unanswered = udp.flows_unanswered,
                "datagrams"
            );
        }
    }

    async fn drain(&self, signals: &mut Signals, limit: Duration) {
        tokio::select! {
            () = drained(&self.fleet) => {}
            () = tokio::time::sleep(limit) => {
                warn!(active = self.active(), "the drain timeout is over: the rest is cut");
            }
            signal = signals.stop() => {
                warn!(signal, active = self.active(), "a second signal: the rest is cut");
            }
        }
    }

    /// The successor has the sockets; the open connections stay here for as long as they like.
    async fn give_way(&self, signals: &mut Signals, successor: Successor) {
        let pid = successor.pid;
        systemd::notify(&[NotifyState::MainPid(pid)]);
        // the successor waits for this before it speaks to systemd itself
        drop(successor);
        self.fleet.supervisor.borrow_mut().drain_all();
        info!(
            successor = pid,
            active = self.active(),
            "handed over: the open connections stay here until they end"
        );
        tokio::select! {
            () = drained(&self.fleet) => {}
            signal = signals.stop() => {
                info!(signal, active = self.active(), "stopping");
                self.drain(signals, self.args.drain_timeout).await;
            }
        }
    }

    /// Of the relays that run now; and what UDP counts beyond that, where there is UDP.
    fn totals(&self) -> (Totals, Option<udp::Totals>) {
        let supervisor = self.fleet.supervisor.borrow();
        let statuses = self.fleet.statuses();
        let servers = || {
            let running = statuses
                .iter()
                .filter_map(|(name, _)| supervisor.task(name));
            running.map(|relay| Rc::clone(&relay.server))
        };
        let datagrams = servers().filter_map(|server| server.datagrams());
        (
            servers().map(|server| server.totals()).sum(),
            datagrams.reduce(|mut sum, one| {
                sum += one;
                sum
            }),
        )
    }
}

/// Tells when names of targets have other addresses, for as long as somebody listens.
fn follow_names(resolver: &Rc<Resolver>) -> mpsc::Receiver<()> {
    let (tell, told) = mpsc::channel(1);
    let resolver = Rc::clone(resolver);
    tokio::task::spawn_local(async move {
        loop {
            tokio::select! {
                () = resolver.changed() => if tell.send(()).await.is_err() { return },
                () = tell.closed() => return,
            }
        }
    });
    told
}

/// Waits for the work at hand; looked at again and again, as the supervisor must not be borrowed over a wait.
async fn drained(fleet: &Fleet) {
    let mut look = interval(Duration::from_millis(20));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !fleet.supervisor.borrow_mut().is_drained() {
        look.tick().await;
    }
}

/// Waits for a future where there is one, else for ever.
async fn option<F: Future>(future: Option<F>) -> Option<F::Output> {
    match future {
        Some(future) => Some(future.await),
        None => std::future::pending().await,
    }
}

/// Pings systemd when every worker's event loop has come round, and this one has.
async fn keep_watchdog(fleet: Rc<Fleet>, every: Duration) {
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        match timeout(every, fleet.world.workers.answer()).await {
            Ok(true) => systemd::notify(&[NotifyState::Watchdog]),
            Ok(false) => error!("a worker thread has died: systemd is not pinged any more"),
            Err(_elapsed) => error!("a worker thread does not answer: systemd is not pinged"),
        }
    }
}

/// Answers the control socket.
struct Handler {
    view: View,
    fleet: Rc<Fleet>,
    program: PathBuf,
    name: String,
    lock: Option<Lock>,
    control: std::os::unix::net::UnixListener,
    successors: mpsc::UnboundedSender<Successor>,
}

/// What `upgrade` answers.
#[derive(Serialize)]
struct Upgraded {
    /// The process that answers, and now drains.
    from: u32,
    /// The process that took over.
    to: u32,
    /// Connections that stay with the old one until they end.
    draining: u64,
}

impl Handler {
    async fn handle(&self, request: Request) -> Response {
        match request {
            Request::Reload {} => match self.fleet.reload().await {
                Ok(changes) => Response::ok(&changes),
                Err(ReloadError::Configuration(mistakes)) => {
                    Response::configuration(mistakes.draw(false))
                }
                // closed without an answer in a moment: the caller then asks the successor
                Err(ReloadError::Succeeded) => std::future::pending().await,
                Err(error) => Response::failed(format!("{:#}", anyhow!(error))),
            },
            Request::Upgrade {} => match self.upgrade().await {
                Ok(upgraded) => Response::ok(&upgraded),
                Err(error) => {
                    warn!("not upgraded, this process goes on: {error:#}");
                    Response::failed(format!("{error:#}"))
                }
            },
            Request::Status {}
            | Request::Conns(_)
            | Request::ConnsKill { .. }
            | Request::Explain { .. } => self.view.answer(&request).await,
        }
    }

    async fn upgrade(&self) -> anyhow::Result<Upgraded> {
        let _turn = self.fleet.turn.lock().await;
        if self.fleet.succeeded.get() {
            return std::future::pending().await;
        }
        let estate = self.estate()?;
        let program = self.program.clone();
        let successor = tokio::task::spawn_blocking(move || handover::hand_over(program, estate))
            .await
            .context("the handover panicked")??;
        self.fleet.succeeded.set(true);
        let supervisor = self.fleet.supervisor.borrow();
        let statuses = self.fleet.statuses();
        let active = statuses
            .iter()
            .filter_map(|(name, _)| supervisor.task(name));
        let upgraded = Upgraded {
            from: std::process::id(),
            to: successor.pid,
            draining: active.map(|relay| relay.active()).sum::<u64>() + supervisor.draining(),
        };
        // the answer goes out first: what follows ends the control socket
        let successors = self.successors.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = successors.send(successor);
        });
        Ok(upgraded)
    }

    fn estate(&self) -> anyhow::Result<Estate> {
        let mut estate = Estate {
            control: Some(self.control.try_clone()?.into()),
            ..Estate::default()
        };
        if let Some(lock) = &self.lock {
            estate.locks.insert(self.name.clone(), lock.share()?);
        }
        let supervisor = self.fleet.supervisor.borrow();
        for (name, _) in self.fleet.statuses() {
            let Some(relay) = supervisor.task(&name) else {
                continue;
            };
            estate.listeners.extend(relay.server.listeners()?);
            if let Some(lock) = relay.share_lock() {
                estate.locks.insert(lock_name(&name), lock?);
            }
        }
        Ok(estate)
    }
}

/// The signal that stands for a reload.
const HANGUP: &str = "SIGHUP";

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let install = |kind| signal(kind).context("cannot handle signals");
        Ok(Self {
            terminate: install(SignalKind::terminate())?,
            interrupt: install(SignalKind::interrupt())?,
            hangup: install(SignalKind::hangup())?,
        })
    }

    /// The next one's name. Cancel-safe.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => HANGUP,
        }
    }

    /// The next one that ends the process. Cancel-safe.
    async fn stop(&mut self) -> &'static str {
        loop {
            let name = self.next().await;
            if name != HANGUP {
                return name;
            }
        }
    }
}

/// Idle connections are many and small: in huge pages the process would grow by 2 MiB at a time.
fn refuse_huge_pages() {
    if let Err(errno) = nix::sys::prctl::set_thp_disable(true) {
        debug!(error = %io::Error::from(errno), "cannot do without huge pages");
    }
}

/// Each connection takes two descriptors; the soft limit is usually 1024 for the sake of select(2).
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(())
    });
    if let Err(errno) = raised {
        warn!(error = %io::Error::from(errno), "cannot raise the limit on open files");
    }
}
