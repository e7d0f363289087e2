//! `pathway watch`: install, keep, follow the files, remove; and what is said to systemd on the way.

use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use sd_notify::NotifyState;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch::Sender;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until};
use tracing::{error, info, warn};

use super::{LOCK_LIMIT, configured};
use crate::cli::{Global, PathwayWatchArgs};
use crate::commands::files::Watch;
use crate::commands::leaving::{Leaving, longest_header};
use crate::commands::{drawn, option};
use crate::config::{self, PathwayFiles};
use crate::model::Pathway;
use crate::pathway::watch::Keeper;
use crate::pathway::{self, Options};
use crate::resolve::Resolver;
use crate::runtime_dir::{Attempt, RuntimeDir};
use crate::systemd;

/// The lock of the process that keeps the pathways, and what it publishes its counts under.
pub(super) const NAME: &str = "pathways.watch";

/// Runs the verb.
pub(super) fn run(
    global: &Global,
    files: &PathwayFiles,
    args: &PathwayWatchArgs,
    runtime: &Runtime,
) -> anyhow::Result<ExitCode> {
    configured(files)?;
    let options = Options {
        dry_run: false,
        runtime_dir: RuntimeDir::resolve(global.runtime_dir.clone()),
        lock_timeout: LOCK_LIMIT,
        firewall: global.firewall,
        set_sysctls: global.set_sysctls,
    };
    let _lock = match options.runtime_dir.try_lock(NAME)? {
        Attempt::Held(lock) => lock,
        Attempt::HeldBy(pid) => {
            let pid = pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
            println!("the pathways are kept already, pid {pid}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        // the files once more, now that a change of them is told
        let changes = Watch::new().context("cannot watch the configuration")?;
        changes
            .follow([global.config_dir.clone()])
            .context("cannot watch the configuration")?;
        let resolver = Rc::new(Resolver::default());
        let files = config::load_pathways(&global.config_dir)?;
        let files = resolved(&resolver, files).await;
        let leaving = Leaving::new(configured(&files)?);
        let wanted = Sender::new(leaving.in_place());
        // listens from here on: what happens during the installation is not missed
        let keeper = Keeper::open(wanted.subscribe(), options.clone(), args.poll, NAME)
            .await
            .context("cannot watch the pathways")?;
        let mut process = Process {
            global,
            options,
            wanted,
            leaving,
            grace: longest_header(files.instances.iter()),
            keeper,
            resolver,
        };
        process.install().await?;
        let kept = process.keep(&mut signals, &changes).await;
        systemd::notify(&[NotifyState::Stopping]);
        match args.no_remove {
            true => process.leave().await,
            false => process.remove().await?,
        }
        kept.map(|()| ExitCode::SUCCESS)
    })
}

struct Process<'g> {
    global: &'g Global,
    options: Options,
    /// What is to be in place.
    wanted: Sender<Vec<Pathway>>,
    /// What of that the files have no more.
    leaving: Leaving,
    /// For how long that stays, whatever is open.
    grace: Duration,
    keeper: Keeper,
    resolver: Rc<Resolver>,
}

enum Event {
    Due,
    Stop(&'static str),
    Reload(&'static str),
    Watchdog,
    Leaving,
}

impl Process<'_> {
    async fn install(&mut self) -> anyhow::Result<()> {
        let pathways = self.wanted.borrow().clone();
        match pathway::add(&pathways, &self.options).await {
            Ok(report) => {
                for note in &report.notes {
                    info!("{note}");
                }
                self.keeper.installed();
                let (changes, pathways) = (report.changes.len(), pathways.len());
                info!(changes, pathways, "pathways are in place");
            }
            // early in the boot: what can be there is made now, the routes when lo is up
            Err(error) if error.is_network_down() => {
                warn!("lo is down: the pathways are completed when it comes up");
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot add {}", super::named(&pathways)));
            }
        }
        self.keeper.tend().await;
        Ok(())
    }

    /// Keeps the pathways until a signal ends it.
    async fn keep(&mut self, signals: &mut Signals, files: &Watch) -> anyhow::Result<()> {
        let mut watchdog = Watchdog::new();
        systemd::notify(&[NotifyState::Ready]);
        let mut said = String::new();
        let resolver = Rc::clone(&self.resolver);
        // one future for all rounds: it has timers, and a stream of events
        let mut names = Box::pin(resolver.changed());
        loop {
            let summary = self.keeper.summary();
            if summary != said {
                systemd::notify(&[NotifyState::Status(&summary)]);
                said = summary;
            }
            let event = tokio::select! {
                due = self.keeper.due() => {
                    due.context("cannot listen to the kernel's changes")?;
                    Event::Due
                }
                event = signals.next() => event,
                changed = files.changed() => {
                    changed.context("cannot watch the configuration")?;
                    Event::Reload("a file of the configuration changed")
                }
                () = &mut names => {
                    names = Box::pin(resolver.changed());
                    Event::Reload("a target has another address")
                }
                () = watchdog.tick() => Event::Watchdog,
                _ = option(self.leaving.next_look().map(sleep_until)) => Event::Leaving,
            };
            match event {
                Event::Due => self.keeper.tend().await,
                Event::Watchdog => systemd::notify(&[NotifyState::Watchdog]),
                Event::Reload(why) => self.reload(why).await,
                Event::Leaving => self.let_go().await,
                Event::Stop(signal) => {
                    info!(signal, repairs = self.keeper.repairs().total(), "stopping");
                    return Ok(());
                }
            }
        }
    }

    /// Follows the files; a mistake in them changes nothing.
    async fn reload(&mut self, why: &str) {
        systemd::reloading();
        let loaded = match config::load_pathways(&self.global.config_dir) {
            Ok(files) => Ok(resolved(&self.resolver, files).await),
            Err(mistakes) => Err(mistakes),
        };
        let loaded =
            loaded
                .map_err(|mistakes| drawn(&mistakes))
                .and_then(|files| match configured(&files) {
                    Ok(pathways) => Ok((pathways, longest_header(files.instances.iter()))),
                    Err(error) => Err(error.to_string()),
                });
        match loaded {
            Err(mistakes) => error!(
                why,
                "not reloaded, the pathways stay as they were:\n{mistakes}"
            ),
            Ok((new, grace)) => self.change(why, new, grace).await,
        }
        systemd::notify(&[NotifyState::Ready]);
    }

    async fn change(&mut self, why: &str, new: Vec<Pathway>, grace: Duration) {
        let pathways = new.len();
        if !self.leaving.wants(&new) {
            // the grace is that of the lines that the open connections came in by
            self.leaving = self.leaving.change(new, self.grace);
            self.wanted.send_replace(self.leaving.in_place());
            self.keeper.tend().await;
            info!(why, pathways, "reloaded");
        }
        self.grace = grace;
    }

    /// Lets go of what the files no longer want and no connection uses any more. Which connections wait for
    /// their header, only the relays know.
    async fn let_go(&mut self) {
        if let Some(gone) = self.leaving.look(true) {
            self.wanted.send_replace(self.leaving.in_place());
            self.keeper.tend().await;
            if !gone.is_empty() {
                self.del(&gone).await;
                info!(removed = gone.len(), "pathways are removed");
            }
        }
    }

    /// Says what stays that nobody will remove.
    async fn leave(&mut self) {
        if let Some(gone) = self.leaving.look(false) {
            self.del(&gone).await;
        }
        let marks: Vec<_> = self
            .leaving
            .in_no_file()
            .map(|one| one.mark.to_string())
            .collect();
        if !marks.is_empty() {
            let marks = marks.join(" ");
            warn!(
                "pathways that are in no file any more stay, too: mmproxyctl pathway del {marks}"
            );
        }
    }

    async fn del(&self, pathways: &[Pathway]) {
        if let Err(error) = pathway::del(pathways, &self.options).await {
            let error = anyhow::Error::from(error);
            error!("cannot delete {}: {error:#}", super::named(pathways));
        }
    }

    async fn remove(self) -> anyhow::Result<()> {
        let pathways = self.wanted.borrow().clone();
        let report = pathway::del(&pathways, &self.options)
            .await
            .with_context(|| format!("cannot delete {}", super::named(&pathways)))?;
        info!(changes = report.changes.len(), "pathways are removed");
        Ok(())
    }
}

/// The files with the addresses that the names of targets have now, and had before.
async fn resolved(resolver: &Resolver, files: PathwayFiles) -> PathwayFiles {
    let named = files.instances.iter();
    let named = named.filter(|instance| !instance.named.is_empty());
    let interval = named
        .clone()
        .filter_map(|instance| instance.options.resolve)
        .min();
    let wanted = named.flat_map(|instance| instance.named.wanted()).collect();
    resolver.want(wanted, interval.unwrap_or(Resolver::INTERVAL));
    resolver.look_at_new().await;
    files.with_answers(&resolver.answers())
}

/// Pings systemd, where it wants that: the loop that repairs is the one that pings.
struct Watchdog(Option<Interval>);

impl Watchdog {
    fn new() -> Self {
        Self(systemd::watchdog_interval().map(|every: Duration| {
            let mut tick = interval(every);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            tick
        }))
    }

    /// Cancel-safe.
    async fn tick(&mut self) {
        option(self.0.as_mut().map(Interval::tick)).await;
    }
}

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

    /// Cancel-safe.
    async fn next(&mut self) -> Event {
        tokio::select! {
            _ = self.terminate.recv() => Event::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Event::Stop("SIGINT"),
            _ = self.hangup.recv() => Event::Reload("SIGHUP"),
        }
    }
}
