//! Keeping pathways: told by the kernel what changed, reading again just that, and putting back what is
//! missing while everything else stays as it is.
//!
//! | file | owns |
//! |---|---|
//! | `events` | the kernel's notifications: which part to read again |
//! | `look` | reading it again, and what that shows to be lost |
//! | `mend` | doing what can be done, and saying what was |
//! | `culprit` | who took a piece away |
//! | `pieces` | which pieces are lost, which were put back |
//! | `storm` | how long to wait when something takes them again and again |
//! | [`repairs`] | what was repaired, and where other processes find it |
//!
//! State is always read *after* the notifications that were there by then were taken: whatever is told
//! later is a change that the reading may have missed, and nothing else is. So an own change, read back,
//! causes no further work. Must not know: configuration files, systemd, signals.

mod culprit;
mod events;
mod look;
mod mend;
mod pieces;
pub mod repairs;
mod storm;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, error, info};

use crate::causes::with_causes;
use crate::model::Pathway;

use super::host::{self, Error, Host, Means, Options, Reading};
use super::plan::{self, Change, Goal};
use culprit::Culprits;
use events::{Events, News, Parts};
use pieces::Losses;
use repairs::{Published, Repairs};
use storm::Storms;

pub use pieces::Kind;

/// How long it must be quiet before a repair: what deletes one piece usually deletes the next.
const QUIET: Duration = Duration::from_millis(5);
/// However busy it is, a repair is not put off longer than this.
const LONGEST: Duration = Duration::from_millis(25);
/// The same for what only may change how the scheme looks, such as a route of somebody else's.
const QUIET_FACTS: Duration = Duration::from_millis(50);
const LONGEST_FACTS: Duration = Duration::from_millis(250);

/// Keeps a set of pathways in place. Runs on a current-thread runtime.
#[derive(Debug)]
pub struct Keeper {
    wanted: watch::Receiver<Vec<Pathway>>,
    options: Options,
    poll: Duration,
    host: Host,
    events: Events,
    news: News,
    /// The first and the last notification since the last look.
    told: Option<(Instant, Instant)>,
    polled: Instant,
    /// What `reading` is about.
    pathways: Vec<Pathway>,
    tables: BTreeSet<u32>,
    reading: Reading,
    losses: Losses,
    storms: Storms,
    repairs: Repairs,
    published: Published,
    /// What was said last about what cannot be mended, so that it is said once.
    complaint: String,
}

/// What a round of repairing did.
#[derive(Debug, Default)]
struct Round {
    applied: Vec<Change>,
    failures: BTreeSet<String>,
}

impl Keeper {
    /// Subscribes and reads; changes nothing yet. `name` is what the counts are published under.
    ///
    /// # Errors
    /// When the kernel cannot be listened to or read.
    pub async fn open(
        mut wanted: watch::Receiver<Vec<Pathway>>,
        options: Options,
        poll: Duration,
        name: &str,
    ) -> Result<Self, Error> {
        let pathways = wanted.borrow_and_update().clone();
        let host = Host::open(Goal::Add, Means::of(&options))?;
        // before the reading: what changes under way is told
        let events = Events::open().map_err(Error::Events)?;
        let reading = host.read(&pathways).await?;
        let published = Published::new(&options.runtime_dir, name)?;
        let mut keeper = Self {
            wanted,
            options,
            poll,
            host,
            events,
            news: News::default(),
            told: None,
            polled: Instant::now(),
            tables: plan::tables_to_read(&pathways, &reading.present.rules),
            pathways,
            reading,
            losses: Losses::default(),
            storms: Storms::default(),
            repairs: Repairs::new(),
            published,
            complaint: String::new(),
        };
        let plan = keeper.plan_for(&keeper.pathways, &keeper.reading.facts);
        let nothing_before = BTreeMap::new();
        keeper.losses.update(
            &pieces::missing(&plan),
            &nothing_before,
            &Culprits::default(),
            Instant::now(),
        );
        keeper.count_for_pathways();
        keeper.publish();
        Ok(keeper)
    }

    /// All of it was installed, and verified: whatever is missing from here on is lost.
    pub fn installed(&mut self) {
        self.losses.none();
        self.news.parts = Parts::ALL;
    }

    /// Waits until there may be something to repair. Cancel-safe.
    ///
    /// # Errors
    /// When the kernel's notifications cannot be read.
    pub async fn due(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            let at = self.due_at();
            if at <= now {
                return Ok(());
            }
            tokio::select! {
                told = self.events.wait() => {
                    told?;
                    self.take()?;
                }
                changed = self.wanted.changed() => match changed {
                    Ok(()) => return Ok(()),
                    // nobody will ever say otherwise
                    Err(_) => tokio::time::sleep_until(at.into()).await,
                },
                () = tokio::time::sleep_until(at.into()) => {}
            }
        }
    }

    fn due_at(&self) -> Instant {
        let poll = self.polled + self.poll;
        let told = self.told.map(|(first, last)| {
            let (quiet, longest) = if self.news.parts.pieces() {
                (QUIET, LONGEST)
            } else {
                (QUIET_FACTS, LONGEST_FACTS)
            };
            (last + quiet).min(first + longest)
        });
        let others = [told, self.storms.next()].into_iter().flatten();
        others.fold(poll, Instant::min)
    }

    /// Takes what was told until now.
    fn take(&mut self) -> io::Result<()> {
        let before = self.news.parts;
        self.events.take(&self.tables, &mut self.news)?;
        if self.news.parts.any() {
            let now = Instant::now();
            // what only concerned facts may have waited for longer than a piece may
            let first = self
                .told
                .filter(|_| before.pieces() || !self.news.parts.pieces());
            self.told = Some((first.map_or(now, |(first, _)| first), now));
        }
        Ok(())
    }

    /// Looks at what changed and repairs. What cannot be done is said, and tried again later.
    pub async fn tend(&mut self) {
        let now = Instant::now();
        if now >= self.polled + self.poll {
            self.polled = now;
            // sysctls tell nobody, and neither does iptables-legacy
            self.news.parts.facts = true;
            self.news.parts.firewall |= self.host.is_silent(&self.reading.present);
        }
        let since = self.told.take().map_or(now, |(first, _)| first);
        self.storms.release(now);
        for mark in self.storms.calmed(now) {
            info!(%mark, "the storm is over: nothing takes the pathway away any more");
        }
        let outcome = self.round(since).await;
        self.news.culprits.clear();
        match outcome {
            Ok(round) => self.complain(round.failures),
            Err(error) => {
                // what was read may be of two moments
                self.news.parts = Parts::ALL;
                self.complain(BTreeSet::from([with_causes(&error)]));
            }
        }
    }

    async fn round(&mut self, since: Instant) -> Result<Round, Error> {
        self.look(since).await?;
        let mut round = Round::default();
        if self.planned(&mut round.failures).changes.is_empty() {
            return Ok(round);
        }
        let _lock = host::lock(&self.options).await?;
        // another run may have had the lock, and changed or mended it; where nobody tells of it, too
        self.news.parts.firewall |= self.host.is_silent(&self.reading.present);
        self.look(since).await?;
        let plan = self.planned(&mut BTreeSet::new());
        if plan.changes.is_empty() {
            return Ok(round);
        }
        self.apply(plan.changes, &mut round).await;
        for change in &round.applied {
            match Kind::of(&change.command) {
                Kind::Rule => self.news.parts.rules = true,
                Kind::Route => self.news.parts.routes = true,
                Kind::Firewall => self.news.parts.firewall = true,
            }
        }
        self.settle(&round.applied);
        // read back: what is missing now was taken meanwhile, and is the next round's
        let now = Instant::now();
        self.look(now).await?;
        if self.is_incomplete() && round.failures.is_empty() {
            self.told = Some((now, now));
        }
        Ok(round)
    }

    fn complain(&mut self, failures: BTreeSet<String>) {
        let text = failures.into_iter().collect::<Vec<_>>().join("; ");
        if text != self.complaint && !text.is_empty() {
            error!(
                missing = self.losses.len(),
                "not all can be mended now: {text}"
            );
        } else if text.is_empty() && !self.complaint.is_empty() {
            info!("all is in place again");
        }
        self.complaint = text;
    }

    fn publish(&mut self) {
        if let Err(error) = self.published.update(&self.repairs) {
            debug!(%error, "cannot publish the counts of repairs");
        }
    }

    /// Whether a piece is missing.
    pub fn is_incomplete(&self) -> bool {
        self.losses.len() > 0
    }

    /// What was repaired until now.
    pub fn repairs(&self) -> &Repairs {
        &self.repairs
    }

    /// One line for a person: how things are.
    pub fn summary(&self) -> String {
        let pathways = match self.pathways.len() {
            1 => "1 pathway".to_owned(),
            many => format!("{many} pathways"),
        };
        let state = match self.losses.len() {
            0 => "in place".to_owned(),
            missing => format!("kept, {missing} pieces missing"),
        };
        let mut line = format!("{pathways} {state}, {} repairs", self.repairs.total());
        if !self.complaint.is_empty() {
            line.push_str(&format!("; {}", self.complaint));
        }
        line
    }
}
