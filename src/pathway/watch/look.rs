//! Reading again what may have changed, and what that shows to be lost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tracing::{info, warn};

use super::Keeper;
use super::events::Parts;
use super::mend::named;
use super::pieces::{self, Piece};
use crate::model::{Mark, Pathway};
use crate::pathway::host::{Error, Host, Means};
use crate::pathway::plan::{self, Facts, Goal, Plan};

impl Keeper {
    /// Reads again what may have changed, and notes what is lost.
    pub(super) async fn look(&mut self, since: Instant) -> Result<(), Error> {
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
        if parts.rules {
            host.read_rules(&mut reading.present).await?;
        }
        // the back end that holds lines is a fact, too; and so is what is in use of what is there
        if parts.facts || parts.firewall {
            let facts = host.read_facts(pathways, &reading.present);
            (reading.facts, reading.notes) = facts.await?;
            host.read_switch(&mut reading.present)?;
        }
        // rules say which tables matter
        let tables = plan::tables_to_read(pathways, &reading.present.rules);
        if parts.routes || tables != self.tables {
            self.tables = tables;
            host.read_routes(pathways, &mut reading.present).await?;
        }
        Ok(())
    }

    pub(super) fn plan_for(&self, pathways: &[Pathway], facts: &Facts) -> Plan {
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

    /// Every pathway has its counts, from 0 on, and no other has.
    pub(super) fn count_for_pathways(&mut self) {
        let marks: BTreeSet<Mark> = self.pathways.iter().map(|one| one.mark).collect();
        self.repairs.of(&marks);
    }
}
