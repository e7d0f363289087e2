//! Keeping pathways: told by the kernel what changed, reading again just that, and putting back what is
//! missing while everything else stays as it is.
//!
//! | file | owns |
//! |---|---|
//! | `events` | the kernel's notifications: which part to read again |
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
mod pieces;
pub mod repairs;
mod storm;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use crate::model::{Mark, Pathway};

use super::firewall::{self, same_transaction};
use super::host::{self, Error, Host, Means, Options, Reading};
use super::piece::Step;
use super::plan::{self, Change, Conflict, Facts, Goal, Outcome, Plan};
use culprit::Culprits;
use events::{Events, News, Parts};
use pieces::{Losses, Piece};
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

/// So many pieces are named in a line of the log; -v has all of them.
const NAMED: usize = 4;

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

    /// Every pathway has its counts, from 0 on, and no other has.
    fn count_for_pathways(&mut self) {
        let marks: BTreeSet<Mark> = self.pathways.iter().map(|one| one.mark).collect();
        self.repairs.of(&marks);
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
                self.complain(BTreeSet::from([chain(&error)]));
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

    /// Reads again what may have changed, and notes what is lost.
    async fn look(&mut self, since: Instant) -> Result<(), Error> {
        let old = (self.pathways.clone(), self.reading.facts.clone());
        let wanted = self.wanted.borrow_and_update().clone();
        if wanted != self.pathways {
            // programs may have been installed since
            self.host = Host::open(Goal::Add, Means::of(&self.options))?;
            self.pathways = wanted;
            self.news.parts = Parts::ALL;
        }
        self.events
            .take(&self.tables, &mut self.news)
            .map_err(Error::Events)?;
        if std::mem::take(&mut self.news.overrun) {
            self.repairs.overruns += 1;
            warn!("the kernel's events came too fast and some were lost: everything is read again");
        }
        let parts = self.news.parts;
        if parts.any() {
            let notes = self.reading.notes.clone();
            self.read_again(parts).await?;
            self.news.parts = Parts::default();
            for note in self
                .reading
                .notes
                .iter()
                .filter(|note| !notes.contains(note))
            {
                info!("{note}");
            }
        }
        self.note_losses(&old.0, &old.1, since);
        self.count_for_pathways();
        self.publish();
        Ok(())
    }

    async fn read_again(&mut self, parts: Parts) -> Result<(), Error> {
        let Self {
            host,
            reading,
            pathways,
            ..
        } = self;
        if parts.firewall {
            host.read_firewall(&mut reading.present).await?;
        }
        // the back end that holds lines is a fact, too
        if parts.facts || parts.firewall {
            let facts = host.read_facts(pathways, &reading.present.firewall);
            (reading.facts, reading.notes) = facts.await?;
            host.read_switch(&mut reading.present)?;
        }
        if parts.rules {
            host.read_rules(&mut reading.present).await?;
        }
        // rules say which tables matter
        let tables = plan::tables_to_read(pathways, &reading.present.rules);
        if parts.routes || tables != self.tables {
            self.tables = tables;
            host.read_routes(pathways, &mut reading.present).await?;
        }
        Ok(())
    }

    fn plan_for(&self, pathways: &[Pathway], facts: &Facts) -> Plan {
        plan::plan(Goal::Add, pathways, facts, &self.reading.present)
    }

    fn note_losses(&mut self, pathways: &[Pathway], facts: &Facts, since: Instant) {
        let plan = self.plan_for(&self.pathways, &self.reading.facts);
        let missing = pieces::missing(&plan);
        let same = (pathways, facts) == (self.pathways.as_slice(), &self.reading.facts);
        let old = (!same).then(|| self.plan_for(pathways, facts));
        let before = match &old {
            Some(old) => pieces::missing(old),
            None => missing.clone(),
        };
        let culprits = &self.news.culprits;
        let newly = self.losses.update(&missing, &before, culprits, since);
        let mut by_mark = BTreeMap::<Mark, Vec<&Piece>>::new();
        for piece in &newly {
            by_mark.entry(piece.mark).or_default().push(piece);
        }
        let now = Instant::now();
        for (mark, pieces) in by_mark {
            let Some(gust) = self.storms.lost(mark, &pieces, now) else {
                continue;
            };
            self.repairs.storms += u64::from(gust.losses == 1);
            warn!(
                %mark, by = %self.losses.who(pieces[0]), lost = %named(&pieces), repairs = gust.losses,
                pause = ?gust.pause,
                "a storm: something takes the pathway away again and again; waiting before it is put back"
            );
        }
    }

    /// What there is to do now; what forbids it goes to `failures`.
    fn planned(&self, failures: &mut BTreeSet<String>) -> Plan {
        let now = Instant::now();
        let plan = self.plan_for(&self.pathways, &self.reading.facts);
        failures.extend(plan.conflicts.iter().map(ToString::to_string));
        let taken: BTreeSet<Mark> = plan.conflicts.iter().map(Conflict::mark).collect();
        let free = |pathway: &&Pathway| {
            !taken.contains(&pathway.mark) && !self.storms.holds(pathway.mark, now)
        };
        let now: Vec<Pathway> = self.pathways.iter().filter(free).cloned().collect();
        if now.len() == self.pathways.len() {
            return plan;
        }
        self.plan_for(&now, &self.reading.facts)
    }

    /// As much as can be done: a piece that fails does not keep the others, but nothing is taken away
    /// then.
    async fn apply(&self, changes: Vec<Change>, round: &mut Round) {
        let steps: Vec<Step> = changes
            .iter()
            .map(|change| change.command.clone())
            .collect();
        let mut changes = changes.into_iter();
        let mut last = None::<&Step>;
        for batch in steps.chunk_by(same_transaction) {
            if last.is_some_and(|last| firewall::is_switch(last, &batch[0])) {
                firewall::settle();
            }
            last = batch.last();
            let of: Vec<Change> = changes.by_ref().take(batch.len()).collect();
            let makes =
                |change: &Change| matches!(change.outcome, Outcome::Added | Outcome::Adopted);
            if !round.failures.is_empty() && !of.iter().any(makes) {
                continue;
            }
            match self.host.run(batch).await {
                Ok(()) => round.applied.extend(of),
                Err(error) if error.is_network_down() => {
                    round
                        .failures
                        .insert("lo is down, and routes need it".to_owned());
                }
                Err(error) => _ = round.failures.insert(chain(&error)),
            }
        }
    }

    /// Counts what was put back, and says so.
    fn settle(&mut self, applied: &[Change]) {
        let mended = self.losses.made(applied.iter().filter_map(Piece::made_by));
        let mut groups = BTreeMap::<(Mark, String), (Instant, Vec<&Piece>)>::new();
        for (piece, loss) in &mended.repaired {
            self.repairs.count(piece.mark, piece.kind);
            debug!(mark = %piece.mark, by = %loss.who, lost = piece.text, "repaired");
            let group = (piece.mark, loss.who.to_string());
            let entry = groups.entry(group).or_insert((loss.since, Vec::new()));
            entry.0 = entry.0.min(loss.since);
            entry.1.push(piece);
        }
        for ((mark, by), (since, pieces)) in groups {
            let after = since.elapsed();
            warn!(%mark, by, lost = %named(&pieces), ?after, "repaired");
        }
        if !mended.completed.is_empty() {
            let pieces: Vec<&Piece> = mended.completed.iter().collect();
            info!(pieces = pieces.len(), made = %named(&pieces), "completed");
        }
        let mut others = BTreeMap::<Outcome, Vec<String>>::new();
        for change in applied
            .iter()
            .filter(|change| change.outcome != Outcome::Added)
        {
            let of = others.entry(change.outcome).or_default();
            of.push(change.command.to_string());
        }
        for (outcome, commands) in others {
            info!(changes = commands.len(), done = %some_of(&commands), "{outcome}");
        }
        self.publish();
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

/// The pieces of one line.
fn named(pieces: &[&Piece]) -> String {
    let texts: Vec<&str> = pieces.iter().map(|piece| piece.text.as_str()).collect();
    some_of(&texts)
}

fn some_of(texts: &[impl AsRef<str>]) -> String {
    let first: Vec<&str> = texts.iter().take(NAMED).map(AsRef::as_ref).collect();
    let mut text = first.join("; ");
    let more = texts.len().saturating_sub(NAMED);
    if more > 0 {
        text.push_str(&format!("; and {more} more"));
    }
    text
}

/// An error with its causes, in one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
