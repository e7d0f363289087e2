//! `--manage-pathways`: the pathways of this process's instances, kept in place while it runs.

use std::time::Duration;

use tokio::sync::watch::Sender;
use tokio::task::AbortHandle;
use tracing::error;

use crate::model::Pathway;
use crate::pathway::watch::Keeper;
use crate::pathway::{self, Options};

/// How often to look at what the kernel does not tell of.
const POLL: Duration = Duration::from_secs(2);

/// A task that keeps pathways. Ends with the value.
#[derive(Debug)]
pub(super) struct Keeping {
    wanted: Sender<Vec<Pathway>>,
    task: AbortHandle,
}

impl Keeping {
    /// Begins. `name` is what the counts of repairs are published under.
    pub(super) async fn start(
        pathways: Vec<Pathway>,
        options: Options,
        name: &str,
    ) -> Result<Self, pathway::Error> {
        let wanted = Sender::new(pathways);
        let mut keeper = Keeper::open(wanted.subscribe(), options, POLL, name).await?;
        let task = tokio::task::spawn_local(async move {
            loop {
                if let Err(error) = keeper.due().await {
                    error!(%error, "the pathways are not kept any more: cannot listen to the kernel's changes");
                    return;
                }
                keeper.tend().await;
            }
        });
        Ok(Self {
            wanted,
            task: task.abort_handle(),
        })
    }

    /// These from now on. What is no longer wanted may be removed right after.
    pub(super) fn want(&self, pathways: Vec<Pathway>) {
        self.wanted.send_replace(pathways);
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        // in the midst of a repair, too: each step is whole, and the lock goes with the task
        self.task.abort();
    }
}
