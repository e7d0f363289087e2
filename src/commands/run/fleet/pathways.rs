//! The pathways of a process that manages them (`--manage-pathways`): installed, changed by a reload, removed.

use std::rc::Rc;

use tokio::time::sleep_until;
use tracing::{info, warn};

use super::{Fleet, LOCK_LIMIT, specs, used};
use crate::commands::leaving::longest_header;
use crate::commands::option;
use crate::commands::run::plan::Specs;
use crate::commands::run::relay::lock_name;
use crate::model::{Instance, Mark, Pathway};
use crate::pathway;
use crate::runtime_dir::Attempt;

impl Fleet {
    pub(super) async fn install(&self, pathways: &[Pathway]) -> Result<(), pathway::Error> {
        if pathways.is_empty() {
            return Ok(());
        }
        let report = pathway::add(pathways, &self.options()).await?;
        for note in &report.notes {
            warn!("{note}");
        }
        info!(
            changes = report.changes.len(),
            pathways = pathways.len(),
            "pathways are in place"
        );
        Ok(())
    }

    /// Installs pathways, and leaves what was in place until no connection of these instances needs it.
    pub(super) async fn install_beside(
        &self,
        pathways: Vec<Pathway>,
        before: &Specs,
    ) -> Result<(), pathway::Error> {
        let grace = longest_header(before.values().map(|spec| &spec.instance));
        let mut leaving = self.leaving.borrow().change(pathways, grace);
        match self.install(&leaving.in_place()).await {
            Err(pathway::Error::Conflict(conflict)) if leaving.next_look().is_some() => {
                warn!(%conflict, "what was in place cannot stay beside what the files want");
                leaving.cut_short();
                self.install(&leaving.in_place()).await?;
            }
            installed => installed?,
        }
        self.want(leaving.in_place());
        self.leaving.replace(leaving);
        self.left.notify_one();
        Ok(())
    }

    /// Has these pathways kept from here on.
    fn want(&self, pathways: Vec<Pathway>) {
        if let Some(keeping) = &*self.keeping.borrow() {
            keeping.want(pathways);
        }
    }

    /// Waits until [`Fleet::let_go`] may have something to do. Cancel-safe.
    pub(in crate::commands::run) async fn leaving_due(&self) {
        loop {
            let at = self.leaving.borrow().next_look();
            tokio::select! {
                _ = option(at.map(sleep_until)) => return,
                () = self.left.notified() => {}
            }
        }
    }

    /// Lets go of what the files no longer want of the pathways and no connection uses any more.
    pub(in crate::commands::run) async fn let_go(&self) {
        let _turn = self.turn.lock().await;
        if self.succeeded.get() {
            return;
        }
        let gone = self.leaving.borrow_mut().look(self.waits());
        if let Some(gone) = gone {
            // before: what is kept is put back
            self.want(self.leaving.borrow().in_place());
            self.remove(&gone).await;
        }
    }

    /// Whether a connection waits for its header: its target is that of the time when it was accepted.
    fn waits(&self) -> bool {
        let supervisor = self.supervisor.borrow();
        let statuses = self.statuses();
        let running = statuses
            .iter()
            .filter_map(|(name, _)| supervisor.task(name));
        let drained = supervisor.drained_tasks();
        let mut relays = running.chain(drained.into_iter().map(|(_, relay)| relay));
        relays.any(|relay| relay.server.totals().waiting > 0)
    }

    /// The pathway of an instance, also of one that drains.
    pub(in crate::commands::run) fn pathway_of(&self, instance: &Instance) -> Option<Pathway> {
        let configuration = self.world.configuration.borrow();
        let in_files = configuration.pathway_of(instance).cloned();
        in_files.or_else(|| {
            let mut in_place = self.leaving.borrow().in_place().into_iter();
            in_place.find(|pathway| Some(pathway.mark) == instance.mark)
        })
    }

    /// Removes pathways unless another process relays on them.
    async fn remove(&self, pathways: &[Pathway]) {
        let pathways: Vec<Pathway> = pathways
            .iter()
            .filter(|pathway| !self.used_elsewhere(pathway.mark))
            .cloned()
            .collect();
        if pathways.is_empty() {
            return;
        }
        match pathway::del(&pathways, &self.options()).await {
            Ok(report) => info!(changes = report.changes.len(), "pathways are removed"),
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "cannot remove the pathways"
            ),
        }
    }

    fn used_elsewhere(&self, mark: Mark) -> bool {
        let configuration = self.world.configuration.borrow();
        configuration.instances.iter().any(|instance| {
            let name = instance.name.as_str();
            let held = || self.world.runtime_dir.try_lock(&lock_name(name));
            instance.mark == Some(mark)
                && self.supervisor.borrow().task(name).is_none()
                && matches!(held(), Ok(Attempt::HeldBy(pid)) if pid != Some(std::process::id()))
        })
    }

    pub(super) fn options(&self) -> pathway::Options {
        pathway::Options {
            dry_run: false,
            runtime_dir: self.world.runtime_dir.clone(),
            lock_timeout: LOCK_LIMIT,
            firewall: self.world.firewall,
            set_sysctls: self.world.set_sysctls,
        }
    }

    /// Removes what [`Fleet::start`] installed, at the process's end.
    pub(in crate::commands::run) async fn remove_pathways(&self) {
        self.stop_keeping();
        if self.manage_pathways.is_some() {
            let in_place = self.leaving.borrow().in_place();
            self.remove(&in_place).await;
        }
    }

    /// Removes what the files have no more, at the end of a process that another one follows: of what was in
    /// place here, the other one may know nothing.
    pub(in crate::commands::run) async fn remove_left(&self) {
        if self.manage_pathways.is_none() {
            return;
        }
        let Ok(files) = self.origin.load() else {
            warn!(
                "the configuration cannot be read: what it no longer wants of the pathways stays"
            );
            return;
        };
        let wanted = used(&files, &specs(&self.selection, &files));
        let mut left = self.leaving.borrow().in_place();
        left.retain(|one| wanted.iter().all(|wanted| wanted.mark != one.mark));
        if !left.is_empty() {
            let in_use = pathway::connections(&left);
            left.retain(|one| !in_use.contains_key(&one.mark));
            self.world.configuration.replace(Rc::new(files));
            self.remove(&left).await;
        }
    }

    /// Leaves the pathways as they are, to who removes them or keeps them from here on.
    pub(in crate::commands::run) fn stop_keeping(&self) {
        self.keeping.take();
    }
}
