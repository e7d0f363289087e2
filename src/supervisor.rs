//! Named tasks that are kept running: started, started again after a failure, drained.
//!
//! Owns: when a task is started again, and what state it is in and why. Must not know: what a task is;
//! it comes out of a function that the caller gives. Runs on a local runtime, so nothing here is locked.

mod backoff;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tracing::{info, warn};

use backoff::Backoff;

/// After how long without a failure a task counts as healthy: the next failure starts with a short pause again.
const HEALTHY: Duration = Duration::from_secs(60);

/// Something that runs until it fails, or until it has been drained.
pub trait Task {
    /// Why it failed.
    type Error: Display;

    /// Takes on no new work; ends when the work at hand is done.
    fn drain(&self);

    /// How much work is at hand.
    fn active(&self) -> u64;

    /// Waits for the end: by failure, or after a drain. Cancel-safe.
    fn ended(&self) -> impl Future<Output = Result<(), Self::Error>>;
}

/// What a task is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is being started.
    Starting,
    /// It runs.
    Running,
    /// It failed and will be started again.
    Waiting {
        /// When.
        until: Instant,
    },
}

/// A task's state, and how it came to it.
#[derive(Debug, Clone)]
pub struct Status {
    /// The state.
    pub state: State,
    /// Since when.
    pub since: Instant,
    /// Why it last failed, whatever it does now.
    pub last_failure: Option<String>,
    /// How often it has failed.
    pub failures: u64,
}

/// Makes a task, each time anew.
type Start<T> = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<T, String>>>>>;

/// One task under supervision.
struct Slot<T> {
    start: RefCell<Start<T>>,
    name: String,
    status: RefCell<Status>,
    task: RefCell<Option<Rc<T>>>,
    /// Ends a pause before its time.
    retry: Notify,
}

struct Entry<T> {
    slot: Rc<Slot<T>>,
    keeper: AbortHandle,
}

/// Tasks that are being drained, each with since when.
pub type Drained<T> = Vec<(Instant, Rc<T>)>;

/// The tasks of a process. Dropping it stops looking after them.
pub struct Supervisor<T> {
    entries: BTreeMap<String, Entry<T>>,
    keepers: JoinSet<()>,
    draining: JoinSet<()>,
    drained: Rc<RefCell<Drained<T>>>,
    changed: Rc<watch::Sender<()>>,
}

impl<T> std::fmt::Debug for Supervisor<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor")
            .field("names", &self.entries.keys())
            .finish_non_exhaustive()
    }
}

impl<T: Task + 'static> Default for Supervisor<T> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            keepers: JoinSet::new(),
            draining: JoinSet::new(),
            drained: Rc::default(),
            changed: Rc::new(watch::Sender::new(())),
        }
    }
}

impl<T: Task + 'static> Supervisor<T> {
    /// Keeps a task running. `start` makes it, each time anew; a task of this name that is there already
    /// is drained.
    pub fn keep<F, S, E>(&mut self, name: &str, start: F)
    where
        F: Fn() -> S + 'static,
        S: Future<Output = Result<T, E>> + 'static,
        E: Display + 'static,
    {
        self.drain(name);
        let slot = Rc::new(Slot {
            start: RefCell::new(boxed(start)),
            name: name.to_owned(),
            status: RefCell::new(Status {
                state: State::Starting,
                since: Instant::now(),
                last_failure: None,
                failures: 0,
            }),
            task: RefCell::new(None),
            retry: Notify::new(),
        });
        let keeper = self
            .keepers
            .spawn_local(run(Rc::clone(&slot), Rc::clone(&self.changed)));
        self.entries.insert(name.to_owned(), Entry { slot, keeper });
    }

    /// Changes how a task is made the next time; what runs goes on.
    pub fn restart_with<F, S, E>(&self, name: &str, start: F)
    where
        F: Fn() -> S + 'static,
        S: Future<Output = Result<T, E>> + 'static,
        E: Display + 'static,
    {
        if let Some(entry) = self.entries.get(name) {
            *entry.slot.start.borrow_mut() = boxed(start);
        }
    }

    /// Looks after a task no longer, and drains it where it runs. What is at hand goes on.
    pub fn drain(&mut self, name: &str) {
        let Some(Entry { slot, keeper }) = self.entries.remove(name) else {
            return;
        };
        keeper.abort();
        while self.keepers.try_join_next().is_some() {}
        while self.draining.try_join_next().is_some() {}
        let Some(task) = slot.task.borrow_mut().take() else {
            return;
        };
        task.drain();
        let drained = Rc::clone(&self.drained);
        drained
            .borrow_mut()
            .push((Instant::now(), Rc::clone(&task)));
        let name = slot.name.clone();
        self.draining.spawn_local(async move {
            if let Err(error) = task.ended().await {
                warn!(instance = name, "failed while draining: {error:#}");
            }
            drained
                .borrow_mut()
                .retain(|(_, other)| !Rc::ptr_eq(other, &task));
        });
    }

    /// Drains every task.
    pub fn drain_all(&mut self) {
        for name in self.entries.keys().cloned().collect::<Vec<_>>() {
            self.drain(&name);
        }
    }

    /// Whether every drained task has ended.
    pub fn is_drained(&mut self) -> bool {
        while self.draining.try_join_next().is_some() {}
        self.draining.is_empty()
    }

    /// The tasks that are being drained, each with since when.
    pub fn drained_tasks(&self) -> Drained<T> {
        self.drained.borrow().clone()
    }

    /// How much work the tasks that are being drained still have.
    pub fn draining(&self) -> u64 {
        let drained = self.drained.borrow();
        drained.iter().map(|(_, task)| task.active()).sum()
    }

    /// Starts a task at once that waits after a failure.
    pub fn retry(&self, name: &str) {
        if let Some(entry) = self.entries.get(name)
            && matches!(entry.slot.status.borrow().state, State::Waiting { .. })
        {
            entry.slot.retry.notify_one();
        }
    }

    /// The task of a name, where it runs.
    pub fn task(&self, name: &str) -> Option<Rc<T>> {
        self.entries.get(name)?.slot.task.borrow().clone()
    }

    /// The state of every task, by name.
    pub fn statuses(&self) -> impl Iterator<Item = (&str, Status)> {
        self.entries
            .iter()
            .map(|(name, entry)| (name.as_str(), entry.slot.status.borrow().clone()))
    }

    /// Told at every change of a state; several changes may come as one.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Whether every task has been started once, with whatever result.
    pub fn all_tried(&self) -> bool {
        self.entries.values().all(|entry| {
            let status = entry.slot.status.borrow();
            status.failures > 0 || status.state != State::Starting
        })
    }
}

fn boxed<T, F, S, E>(start: F) -> Start<T>
where
    F: Fn() -> S + 'static,
    S: Future<Output = Result<T, E>> + 'static,
    E: Display,
{
    Box::new(move || {
        let task = start();
        // with its causes, where it is an error of anyhow's
        Box::pin(async { task.await.map_err(|error| format!("{error:#}")) })
    })
}

/// The life of a slot.
async fn run<T: Task>(slot: Rc<Slot<T>>, changed: Rc<watch::Sender<()>>) {
    let mut backoff = Backoff::default();
    let enter = |state| {
        let mut status = slot.status.borrow_mut();
        status.state = state;
        status.since = Instant::now();
        drop(status);
        changed.send_replace(());
    };
    loop {
        enter(State::Starting);
        // the function itself is not held over the wait
        let starting = (slot.start.borrow())();
        let failure = match starting.await {
            Ok(task) => {
                let task = Rc::new(task);
                *slot.task.borrow_mut() = Some(Rc::clone(&task));
                enter(State::Running);
                let running = Instant::now();
                let ended = task.ended().await;
                slot.task.borrow_mut().take();
                // its open connections go on; what it holds besides is given up before the next start
                task.drain();
                if running.elapsed() >= HEALTHY {
                    backoff = Backoff::default();
                }
                ended.map_or_else(
                    |error| format!("{error:#}"),
                    |()| "ended by itself".to_owned(),
                )
            }
            Err(failure) => failure,
        };
        let pause = backoff.next();
        let known = {
            let mut status = slot.status.borrow_mut();
            status.failures += 1;
            status.last_failure.replace(failure.clone()) == Some(failure.clone())
        };
        if known {
            info!(instance = slot.name, again_in = ?pause, "still failing: {failure}");
        } else {
            warn!(instance = slot.name, again_in = ?pause, "{failure}");
        }
        let until = Instant::now() + pause;
        enter(State::Waiting { until });
        tokio::select! {
            () = tokio::time::sleep_until(until) => {}
            () = slot.retry.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Runs until told to fail or drained.
    #[derive(Debug, Default)]
    struct Toy {
        end: Notify,
        fault: Rc<Notify>,
    }

    impl Task for Toy {
        type Error = &'static str;

        fn drain(&self) {
            self.end.notify_one();
        }

        fn active(&self) -> u64 {
            1
        }

        async fn ended(&self) -> Result<(), &'static str> {
            tokio::select! {
                () = self.end.notified() => Ok(()),
                () = self.fault.notified() => Err("broken"),
            }
        }
    }

    fn paused(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build_local(Default::default())
            .unwrap()
            .block_on(test);
    }

    #[test]
    fn a_failing_task_waits_longer_each_time_and_leaves_the_others_alone() {
        paused(async {
            let mut supervisor = Supervisor::default();
            let starts = Rc::new(Cell::new(0));
            let counted = Rc::clone(&starts);
            supervisor.keep("bad", move || {
                counted.set(counted.get() + 1);
                async { Err::<Toy, _>("address taken") }
            });
            supervisor.keep("good", async || Ok::<_, &str>(Toy::default()));
            tokio::time::sleep(Duration::from_millis(1)).await;
            let statuses: BTreeMap<_, _> = supervisor
                .statuses()
                .map(|(name, status)| (name.to_owned(), status))
                .collect();
            assert!(matches!(statuses["bad"].state, State::Waiting { .. }));
            assert_eq!(
                statuses["bad"].last_failure.as_deref(),
                Some("address taken")
            );
            assert_eq!(statuses["good"].state, State::Running);
            assert!(supervisor.all_tried());
            assert!(supervisor.task("bad").is_none());
            tokio::time::sleep(Duration::from_secs(3600)).await;
            // with a pause of a minute, give or take a quarter, after the first few
            assert!((48..=90).contains(&starts.get()), "{}", starts.get());
            let before = starts.get();
            supervisor.retry("bad");
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert_eq!(starts.get(), before + 1);
        });
    }

    #[test]
    fn a_task_that_failed_is_started_again() {
        paused(async {
            let mut supervisor = Supervisor::default();
            let fault = Rc::new(Notify::new());
            let given = Rc::clone(&fault);
            supervisor.keep("a", move || {
                let fault = Rc::clone(&given);
                let end = Notify::new();
                async { Ok::<_, &str>(Toy { end, fault }) }
            });
            tokio::time::sleep(Duration::from_millis(1)).await;
            let first = supervisor.task("a").unwrap();
            fault.notify_one();
            tokio::time::sleep(Duration::from_secs(2)).await;
            let second = supervisor.task("a").unwrap();
            assert!(!Rc::ptr_eq(&first, &second));
            let (_, status) = supervisor.statuses().next().unwrap();
            assert_eq!(status.last_failure.as_deref(), Some("broken"));
            assert_eq!(status.failures, 1);
        });
    }

    #[test]
    fn a_drained_task_is_waited_for() {
        paused(async {
            let mut supervisor = Supervisor::default();
            supervisor.keep("a", async || Ok::<_, &str>(Toy::default()));
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert_eq!(supervisor.draining(), 0);
            supervisor.drain_all();
            assert_eq!(supervisor.draining(), 1);
            assert!(!supervisor.is_drained());
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert!(supervisor.is_drained());
            assert_eq!(supervisor.draining(), 0);
            assert_eq!(supervisor.statuses().count(), 0);
        });
    }
}
