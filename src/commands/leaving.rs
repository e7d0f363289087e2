//! What a reload takes out of the files and open connections may still need: pathways as they were.
//!
//! For a moment all of it stays, because a connection that was accepted before may not have got to its target
//! yet. From then on the kernel's list of sockets decides. What a pathway that stays no longer wants is
//! [`pathway::add`]'s affair then, and so the keeper's; here it is about pathways that are in no file any more.
//!
//! Owns: what stays for how long. Must not know: where the files are, who relays, how anything is removed.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tracing::info;

use crate::model::{ConnmarkMode, Instance, InstanceOptions, Mark, Pathway};
use crate::pathway;

/// How soon after a change the first look is, and how far apart those after it become.
const FIRST_LOOK: Duration = Duration::from_millis(250);
const LAST_LOOK: Duration = Duration::from_secs(4);

/// What is wanted, and what was.
#[derive(Debug, Clone)]
pub(super) struct Leaving {
    /// As the files say.
    wanted: Vec<Pathway>,
    /// As they said before.
    former: Vec<Pathway>,
    /// Until when `former` stays as a whole, unless there is no reason to.
    until: Instant,
    /// When to look, and for how long to wait then.
    look: Instant,
    pause: Duration,
    /// Those of `former` that were said to stay.
    said: BTreeSet<Mark>,
}

impl Leaving {
    /// Nothing was wanted before.
    pub(super) fn new(wanted: Vec<Pathway>) -> Self {
        let now = Instant::now();
        Self {
            wanted,
            former: Vec::new(),
            until: now,
            look: now,
            pause: FIRST_LOOK,
            said: BTreeSet::new(),
        }
    }

    /// The files say this now; what was in place stays for so long.
    pub(super) fn change(&self, wanted: Vec<Pathway>, grace: Duration) -> Self {
        if self.wants(&wanted) {
            return self.clone();
        }
        let now = Instant::now();
        Self {
            wanted,
            former: self.in_place(),
            until: now + grace,
            look: now + FIRST_LOOK,
            pause: FIRST_LOOK,
            said: self.said.clone(),
        }
    }

    /// Whether the files said just this before.
    pub(super) fn wants(&self, pathways: &[Pathway]) -> bool {
        self.wanted == pathways
    }

    /// Ends the time in which all of it stays.
    pub(super) fn cut_short(&mut self) {
        self.former = self.in_no_file().cloned().collect();
        self.until = Instant::now();
    }

    /// What is to be in place.
    pub(super) fn in_place(&self) -> Vec<Pathway> {
        let former = |mark| self.former.iter().find(|former| former.mark == mark);
        let wanted = self
            .wanted
            .iter()
            .map(|pathway| match former(pathway.mark) {
                Some(former) => with(pathway, former),
                None => pathway.clone(),
            });
        wanted.chain(self.in_no_file().cloned()).collect()
    }

    /// Those that are in place although no file has them.
    pub(super) fn in_no_file(&self) -> impl Iterator<Item = &Pathway> {
        let stays = |mark| self.wanted.iter().any(|pathway| pathway.mark == mark);
        self.former.iter().filter(move |one| !stays(one.mark))
    }

    /// When it is time for [`Leaving::look`], where anything stays.
    pub(super) fn next_look(&self) -> Option<Instant> {
        (!self.former.is_empty()).then_some(self.look)
    }

    /// Lets go of what no connection uses. Where that changes what is to be in place: the pathways that go as a
    /// whole. `waits` tells that a connection may not have got to its target yet. Blocking, for as long as the
    /// kernel takes to list its sockets.
    pub(super) fn look(&mut self, waits: bool) -> Option<Vec<Pathway>> {
        let now = Instant::now();
        if waits && now < self.until {
            self.look = (now + FIRST_LOOK).min(self.until);
            return None;
        }
        let before = self.in_place();
        self.cut_short();
        let used = pathway::connections(&self.former);
        for (&mark, connections) in &used {
            if self.said.insert(mark) {
                info!(%mark, connections, "wanted no more: the pathway stays until the connections there have ended");
            }
        }
        self.said.retain(|mark| used.contains_key(mark));
        let is_used = |pathway: &Pathway| used.contains_key(&pathway.mark);
        let (stay, gone) = std::mem::take(&mut self.former)
            .into_iter()
            .partition(is_used);
        self.former = stay;
        self.pause = (2 * self.pause).min(LAST_LOOK);
        self.look = now + self.pause;
        (self.in_place() != before).then_some(gone)
    }
}

/// A pathway with the ways that it had.
fn with(pathway: &Pathway, former: &Pathway) -> Pathway {
    let mut with = pathway.clone();
    with.targets.extend(&former.targets);
    with.interceptions.extend(&former.interceptions);
    if with.connmark == ConnmarkMode::Off && with != *pathway {
        with.connmark = former.connmark;
    }
    with
}

/// How long a connection may take until it is on its way to the target, of all of these instances.
pub(super) fn longest_header<'i>(instances: impl Iterator<Item = &'i Instance>) -> Duration {
    let longest = instances
        .map(|instance| instance.options.header_timeout)
        .max();
    longest.unwrap_or(InstanceOptions::DEFAULT_HEADER_TIMEOUT)
}
