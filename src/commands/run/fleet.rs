//! The relays of a process as a whole: which there are, what a reload changes, how they are said to be.

mod pathways;
mod sockets;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::pathways::Keeping;
use super::plan::{Difference, Spec, Specs};
use super::relay::{Relay, World};
use crate::commands::leaving::Leaving;
use crate::config::{Configuration, Diagnostics, Origin};
use crate::model::{Mark, Pathway};
use crate::pathway;
use crate::resolve::Resolver;
use crate::supervisor::{State, Status, Supervisor, Task};
use crate::systemd;

/// How long another run may hold the pathways' lock.
const LOCK_LIMIT: Duration = Duration::from_secs(30);

/// Which instances a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Selection {
    /// Those of instances.tsv, whatever they are.
    All,
    /// Those of flags or a JSON file, whatever they are.
    Standalone,
    /// These, as far as they are in instances.tsv.
    Named(Vec<String>),
}

/// Why a reload changed nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReloadError {
    #[error(transparent)]
    Configuration(#[from] Diagnostics),
    #[error("cannot install the pathways")]
    Pathways(#[from] pathway::Error),
    #[error("another process has taken over")]
    Succeeded,
}

/// What a reload changed.
#[derive(Debug, Default, Serialize)]
pub(super) struct Changes {
    started: Vec<String>,
    stopped: Vec<String>,
    changed: Vec<String>,
    unchanged: usize,
    /// Why those that do not run do not, by name.
    failing: BTreeMap<String, String>,
    pathways_appeared: Vec<Mark>,
    pathways_disappeared: Vec<Mark>,
    notes: Vec<String>,
}

/// A relay on its way.
type Starting = Pin<Box<dyn Future<Output = anyhow::Result<Relay>>>>;

/// The relays of this process.
#[derive(Debug)]
pub(super) struct Fleet {
    pub(super) selection: Selection,
    pub(super) world: Rc<World>,
    pub(super) supervisor: RefCell<Supervisor<Relay>>,
    origin: Origin,
    /// What the counts of repairs are published under, where this process manages its pathways.
    manage_pathways: Option<String>,
    keeping: RefCell<Option<Keeping>>,
    /// What of the pathways is in place, where this process manages them.
    leaving: RefCell<Leaving>,
    /// Told when that has changed.
    left: Notify,
    /// The files as last read, in which targets may be names; the world's has their addresses.
    written: RefCell<Rc<Configuration>>,
    pub(super) resolver: Rc<Resolver>,
    pub(super) specs: RefCell<Specs>,
    /// Reloads and upgrades come one after the other.
    pub(super) turn: tokio::sync::Mutex<()>,
    /// Whether another process has taken over: what is changed from here on is its business.
    pub(super) succeeded: Cell<bool>,
    /// Whether READY=1 was said.
    ready: Cell<bool>,
}

impl Fleet {
    pub(super) fn new(
        selection: Selection,
        world: Rc<World>,
        origin: Origin,
        manage_pathways: Option<String>,
    ) -> Self {
        let written = Rc::clone(&world.configuration.borrow());
        let specs = specs(&selection, &written);
        world.instances.set(specs.len());
        Self {
            selection,
            world,
            supervisor: RefCell::default(),
            origin,
            manage_pathways,
            written: RefCell::new(written),
            resolver: Rc::default(),
            keeping: RefCell::default(),
            leaving: RefCell::new(Leaving::new(Vec::new())),
            left: Notify::new(),
            specs: RefCell::new(specs),
            turn: tokio::sync::Mutex::default(),
            succeeded: Cell::new(false),
            ready: Cell::new(false),
        }
    }

    /// Starts every relay and waits until each was tried once.
    pub(super) async fn start(&self) -> Result<(), pathway::Error> {
        let written = Rc::clone(&self.written.borrow());
        let resolved = Rc::new(self.resolve(&written).await);
        *self.specs.borrow_mut() = specs(&self.selection, &resolved);
        self.world.configuration.replace(resolved);
        let configuration = Rc::clone(&self.world.configuration.borrow());
        if let Some(name) = &self.manage_pathways {
            let wanted = used(&configuration, &self.specs.borrow());
            self.install(&wanted).await?;
            self.leaving.replace(Leaving::new(wanted.clone()));
            let keeping = Keeping::start(wanted, self.options(), name).await?;
            self.keeping.replace(Some(keeping));
        }
        let names: Vec<String> = self.specs.borrow().keys().cloned().collect();
        for name in &names {
            self.keep(name);
        }
        self.tried().await;
        // whatever is left is of instances that are not there or listen elsewhere now
        let left = std::mem::take(&mut *self.world.offered.borrow_mut());
        for (protocol, endpoint) in left.keys() {
            warn!(%protocol, listen = %endpoint, "a passed listening socket is no instance's: closed");
        }
        Ok(())
    }

    fn keep(&self, name: &str) {
        if let Some(start) = self.starting(name) {
            self.supervisor.borrow_mut().keep(name, start);
        }
    }

    /// How the relay of an instance is made, by its line as it is now.
    fn starting(&self, name: &str) -> Option<impl Fn() -> Starting + use<>> {
        let spec = self.specs.borrow().get(name).cloned()?;
        let world = Rc::clone(&self.world);
        Some(move || -> Starting { Box::pin(Relay::start(Rc::clone(&world), spec.clone())) })
    }

    async fn tried(&self) {
        let mut changed = self.supervisor.borrow().subscribe();
        while !self.supervisor.borrow().all_tried() {
            // the sender is in the supervisor, which is here
            let _ = changed.changed().await;
        }
    }

    /// Reads the files and applies the difference; a mistake changes nothing.
    pub(super) async fn reload(&self) -> Result<Changes, ReloadError> {
        let _turn = self.turn.lock().await;
        if self.succeeded.get() {
            return Err(ReloadError::Succeeded);
        }
        if self.ready.get() {
            systemd::reloading();
        }
        let outcome = match self.origin.load() {
            Ok(written) => self.apply(Rc::new(written)).await,
            Err(mistakes) => Err(mistakes.into()),
        };
        match &outcome {
            Ok(changes) => info!(
                started = changes.started.len(),
                stopped = changes.stopped.len(),
                changed = changes.changed.len(),
                unchanged = changes.unchanged,
                "reloaded"
            ),
            Err(ReloadError::Configuration(mistakes)) => {
                warn!(
                    "not reloaded, nothing was changed:\n{}",
                    mistakes.draw(false)
                );
            }
            Err(error) => warn!(%error, "not reloaded, nothing was changed"),
        }
        if self.ready.get() {
            systemd::notify(&[sd_notify::NotifyState::Ready]);
        }
        self.report();
        outcome
    }

    /// Takes over addresses that names of targets have now, as a reload would.
    pub(super) async fn reresolve(&self) {
        let _turn = self.turn.lock().await;
        if self.succeeded.get() {
            return;
        }
        let written = Rc::clone(&self.written.borrow());
        match self.apply(written).await {
            Ok(changes) => info!(changed = ?changes.changed, "targets have other addresses"),
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "targets have other addresses, and nothing was changed"
            ),
        }
    }

    /// A configuration with the addresses of its names, as far as they are known; new ones are looked up.
    async fn resolve(&self, written: &Configuration) -> Configuration {
        let selected = specs(&self.selection, written);
        let named = selected
            .values()
            .map(|spec| &spec.instance)
            .filter(|instance| !instance.named.is_empty());
        let interval = named
            .clone()
            .filter_map(|instance| instance.options.resolve);
        let interval = interval.min().unwrap_or(Resolver::INTERVAL);
        let wanted = named.flat_map(|instance| instance.named.wanted()).collect();
        self.resolver.want(wanted, interval);
        self.resolver.look_at_new().await;
        written.with_answers(&self.resolver.answers())
    }

    async fn apply(&self, written: Rc<Configuration>) -> Result<Changes, ReloadError> {
        let before = Rc::clone(&self.world.configuration.borrow());
        let after = Rc::new(self.resolve(&written).await);
        let wanted = specs(&self.selection, &after);
        let present = self.specs.borrow().clone();
        let difference = Difference::between(&present, &wanted);
        let (old, new) = (used(&before, &present), used(&after, &wanted));
        let marks = |of: &[Pathway]| {
            of.iter()
                .map(|pathway| pathway.mark)
                .collect::<BTreeSet<_>>()
        };
        let mut changes = Changes {
            pathways_appeared: marks(&new).difference(&marks(&old)).copied().collect(),
            pathways_disappeared: marks(&old).difference(&marks(&new)).copied().collect(),
            unchanged: difference.unchanged.len(),
            ..Changes::default()
        };
        if self.manage_pathways.is_some() {
            // the last step that may fail, and the first that acts: make before break
            self.install_beside(new, &present).await?;
        }
        self.written.replace(written);
        self.world.configuration.replace(after);
        self.world.instances.set(wanted.len());
        *self.specs.borrow_mut() = wanted;
        self.follow(&difference, &mut changes).await;
        Ok(changes)
    }

    async fn follow(&self, difference: &Difference, changes: &mut Changes) {
        let Difference {
            start,
            stop,
            set,
            relisten,
            replace,
            unchanged: _,
        } = difference;
        for name in stop.iter().chain(replace) {
            self.offer_sockets_of(name, changes);
        }
        for name in relisten {
            self.offer_ports_of(name);
        }
        for name in stop.iter().chain(replace) {
            systemd::forget(name);
            self.supervisor.borrow_mut().drain(name);
        }
        for name in set {
            self.set(name, changes).await;
            self.note_kept_sockets(name, changes);
        }
        for name in relisten {
            self.set(name, changes).await;
            self.relisten(name, changes);
        }
        for name in start.iter().chain(replace) {
            self.keep(name);
        }
        self.tried().await;
        let left = std::mem::take(&mut *self.world.offered.borrow_mut());
        for (_, endpoint) in left.into_keys() {
            sockets::remove_file(&endpoint);
        }
        changes.started = start.clone();
        changes.stopped = stop.clone();
        let changed = set.iter().chain(relisten).chain(replace);
        changes.changed = changed.cloned().collect();
        changes.failing = self.failing();
    }

    /// Has a relay treat new connections by its new line, on the sockets it has.
    async fn set(&self, name: &str, changes: &mut Changes) {
        let Some(Spec { instance, allow }) = self.specs.borrow().get(name).cloned() else {
            return;
        };
        let Some(relay) = self.supervisor.borrow().task(name) else {
            // it waits after a failure: try the new line at once
            self.keep(name);
            return;
        };
        relay.server.set(&instance, allow);
        if !self.world.no_check
            && let Err(error) = self.world.in_place(instance.mark).await
        {
            changes.notes.push(format!("{name}: {error:#}"));
        }
        // what a restart after a failure begins with
        if let Some(start) = self.starting(name) {
            self.supervisor.borrow().restart_with(name, start);
        }
    }

    /// The state of every instance.
    pub(super) fn statuses(&self) -> Vec<(String, Status)> {
        let supervisor = self.supervisor.borrow();
        supervisor
            .statuses()
            .map(|(name, status)| (name.to_owned(), status))
            .collect()
    }

    /// Connections and flows that are open, those of relays that drain included.
    pub(super) fn active(&self) -> u64 {
        let supervisor = self.supervisor.borrow();
        let running = self.statuses();
        let running = running.iter().filter_map(|(name, _)| supervisor.task(name));
        running.map(|relay| relay.active()).sum::<u64>() + supervisor.draining()
    }

    /// Why those that do not run do not.
    pub(super) fn failing(&self) -> BTreeMap<String, String> {
        let waiting = |status: &Status| matches!(status.state, State::Waiting { .. });
        self.statuses()
            .into_iter()
            .filter(|(_, status)| waiting(status))
            .map(|(name, status)| (name, status.last_failure.unwrap_or_default()))
            .collect()
    }

    /// Tells the service manager how things are; that it is ready once every relay listens.
    pub(super) fn report(&self) {
        let statuses = self.statuses();
        let all = statuses.len();
        let running = |(_, status): &&(String, Status)| status.state == State::Running;
        let running = statuses.iter().filter(running).count();
        let mut line = format!("relaying {running} of {all} instances");
        if let Some((name, reason)) = self.failing().first_key_value() {
            let reason = reason.lines().next().unwrap_or_default();
            line.push_str(&format!("; {name}: {}", reason.trim_end_matches(':')));
        }
        let status = sd_notify::NotifyState::Status(&line);
        if running == all && !self.ready.replace(true) {
            systemd::notify(&[sd_notify::NotifyState::Ready, status]);
            info!(instances = all, "ready");
        } else {
            systemd::notify(&[status]);
        }
    }

    /// Whether every relay listened at some time.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.get()
    }
}

fn specs(selection: &Selection, configuration: &Configuration) -> Specs {
    configuration
        .instances
        .iter()
        .filter(|instance| match selection {
            Selection::All | Selection::Standalone => true,
            Selection::Named(names) => names.iter().any(|name| name == instance.name.as_str()),
        })
        .map(|instance| {
            let spec = Spec {
                instance: instance.clone(),
                allow: configuration.allow_list(instance),
            };
            (instance.name.to_string(), spec)
        })
        .collect()
}

/// The pathways that instances use, in the order of the file.
fn used(configuration: &Configuration, specs: &Specs) -> Vec<Pathway> {
    let marks: BTreeSet<Mark> = specs
        .values()
        .filter_map(|spec| spec.instance.mark)
        .collect();
    let pathways = configuration.pathways.iter();
    pathways
        .filter(|pathway| marks.contains(&pathway.mark))
        .cloned()
        .collect()
}
