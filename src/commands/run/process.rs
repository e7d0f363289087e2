//! A process that runs relays, from its first one to the word that it shall stop.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail};
use sd_notify::NotifyState;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{debug, error, info};

use super::Patience;
use super::diagnosis;
use super::ending::Ending;
use super::fleet::Fleet;
use super::handler::Handler;
use super::handover::{Answer, Successor};
use super::keeper::Kept;
use super::signals::{HANGUP, Signals};
use super::view::View;
use crate::cli::RunArgs;
use crate::commands::files::{self, Watch};
use crate::commands::option;
use crate::control::{client, server};
use crate::doctor::Asker;
use crate::resolve::Resolver;
use crate::runtime_dir::Lock;
use crate::systemd;

/// How often systemd is asked for more patience while a relay cannot listen, and for how much.
const STILL_STARTING: Duration = Duration::from_secs(10);

/// A process that runs relays.
pub(super) struct Process {
    /// For the commands that a diagnosis prints.
    pub(super) asker: Asker,
    pub(super) fleet: Rc<Fleet>,
    pub(super) args: RunArgs,
    pub(super) patience: Patience,
    pub(super) program: PathBuf,
    /// Of its lock and its control socket.
    pub(super) name: String,
    /// The lock of a process that runs all instances; else it is the first instance's.
    pub(super) lock: Option<Lock>,
    pub(super) control: Option<std::os::unix::net::UnixListener>,
    /// The instances that the process before runs, where there is one.
    pub(super) inherited: BTreeSet<String>,
    /// Who stands in for it towards the service manager.
    pub(super) keeper: Kept,
}

/// How a process stops serving.
pub(super) enum Stop {
    /// The signal's name.
    Signal(&'static str),
    /// Another process took over.
    Successor(Successor),
    /// Another process is going to.
    Released,
}

/// What happened to the one that looks after everything.
enum Event {
    Changed,
    Signal(&'static str),
    Reload,
    Tick,
    Files,
    Names,
    Leaving,
    Stop(Stop),
}

impl Process {
    pub(super) fn run(self, answer: Option<Answer>) -> anyhow::Result<ExitCode> {
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
        let hopeless = match self.patience {
            Patience::Retry => failing.len() == all,
            Patience::GiveUp => !failing.is_empty(),
        };
        if lost || (all > 0 && hopeless) {
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
        let (stops, mut stopped) = mpsc::unbounded_channel();
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
            view: view.clone(),
            fleet: Rc::clone(&self.fleet),
            program: self.program.clone(),
            name: self.name.clone(),
            lock: self.lock.take(),
            control: control_again,
            stops,
        });
        let answering = tokio::task::spawn_local(server::serve(control, {
            let handler = Rc::clone(&handler);
            move |request| {
                let handler = Rc::clone(&handler);
                async move { handler.handle(request).await }
            }
        }));
        if let Some(answer) = answer {
            let main = self.keeper.main_pid();
            // also waits until systemd knows us: before, it would not listen
            tokio::task::spawn_blocking(move || answer.ready(main))
                .await
                .context("cannot answer the process before")?
                .context("cannot answer the process before")?;
        }
        let watchdog = systemd::watchdog_interval()
            .map(|every| tokio::task::spawn_local(keep_watchdog(Rc::clone(&self.fleet), every)));
        let diagnosing =
            tokio::task::spawn_local(diagnosis::watch(Rc::clone(&self.fleet), self.asker.clone()));
        let stop = self.look_after(&mut signals, &mut stopped).await?;
        diagnosing.abort();
        if let Some(metrics) = metrics {
            metrics.abort();
        }
        if let (Some(watchdog), Stop::Successor(_) | Stop::Released) = (watchdog, &stop) {
            watchdog.abort();
        }
        Ending {
            process: &self,
            view,
            signals: &mut signals,
            answering,
            handler,
        }
        .take(stop)
        .await;
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

    pub(super) fn remove_control_socket(&self) {
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
        stopped: &mut mpsc::UnboundedReceiver<Stop>,
    ) -> anyhow::Result<Stop> {
        let fleet = &self.fleet;
        let watch = if self.args.watch_config {
            let watch = Watch::new().context("cannot watch the configuration")?;
            watch
                .follow(files::directories(&fleet.world.configuration.borrow()))
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
                Some(stop) = stopped.recv() => Event::Stop(stop),
                Some(()) = resolved.recv() => Event::Names,
                () = fleet.leaving_due() => Event::Leaving,
                _ = tick.tick(), if !fleet.is_ready() => Event::Tick,
                Some(told) = option(watch.as_ref().map(Watch::changed)) => {
                    told.context("cannot watch the configuration")?;
                    Event::Files
                }
            };
            match event {
                Event::Changed => {
                    fleet.report();
                    if self.patience == Patience::GiveUp
                        && let Some((name, reason)) = fleet.failing().first_key_value()
                    {
                        bail!("{name}: {reason}");
                    }
                }
                Event::Signal(name) => return Ok(Stop::Signal(name)),
                Event::Stop(stop) => return Ok(stop),
                Event::Tick => {
                    let patience =
                        u32::try_from(3 * STILL_STARTING.as_micros()).unwrap_or(u32::MAX);
                    systemd::notify(&[NotifyState::ExtendTimeoutUsec(patience)]);
                }
                Event::Names => fleet.reresolve().await,
                Event::Leaving => fleet.let_go().await,
                // what became of it is in the log
                Event::Reload => drop(fleet.reload().await),
                Event::Files => {
                    debug!("the configuration was touched");
                    drop(fleet.reload().await);
                    if let Some(watch) = &watch {
                        let configuration = fleet.world.configuration.borrow().clone();
                        if let Err(error) = watch.follow(files::directories(&configuration)) {
                            error!(%error, "cannot watch all of the configuration");
                        }
                    }
                }
            }
        }
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
