//! Whether the pathways are in place: looked at when asked, not more often than every few seconds,
//! because a look reads all rules, routes and the firewall.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::Subject;
use crate::model::{Mark, Pathway};
use crate::pathway::watch::repairs::{self, Counts};
use crate::pathway::{self, Firewall};
use crate::runtime_dir::RuntimeDir;

/// How old an answer may be.
const FRESH: Duration = Duration::from_secs(5);

/// A pathway of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathwayReport {
    /// Its mark; 0 where the instance has none.
    pub mark: u32,
    /// What people call it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it is in place.
    pub state: PathwayState,
    /// Each missing piece; or, where the state is unknown, why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<String>,
    /// What puts missing pieces in place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// Pieces that were put back, where a process keeps the pathway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repairs: Option<Counts>,
}

/// Whether a pathway is in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathwayState {
    /// All of it.
    InPlace,
    /// Something is missing.
    Incomplete,
    /// It could not be looked at.
    Unknown,
    /// The instance marks nothing: the host's own routing has to lead replies back.
    Unmarked,
}

impl PathwayState {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::InPlace => "in place",
            Self::Incomplete => "incomplete",
            Self::Unknown => "unknown",
            Self::Unmarked => "no mark",
        }
    }
}

/// What a look found: findings by mark, or why there was none.
#[derive(Debug)]
pub(super) struct Seen {
    wanted: Vec<Pathway>,
    at: Instant,
    found: Result<BTreeMap<u32, Vec<String>>, String>,
    repairs: BTreeMap<u32, Counts>,
}

impl Seen {
    /// About one pathway that was looked at.
    pub(super) fn of(&self, mark: Option<Mark>, subject: &Subject) -> PathwayReport {
        let pathway = subject.pathway.as_ref();
        let Some(mark) = mark else {
            return PathwayReport {
                mark: 0,
                name: None,
                state: PathwayState::Unmarked,
                findings: Vec::new(),
                fix: None,
                repairs: None,
            };
        };
        let (state, findings) = match (&self.found, pathway) {
            (Err(why), _) => (PathwayState::Unknown, vec![why.clone()]),
            (Ok(_), None) => (PathwayState::Unknown, Vec::new()),
            (Ok(found), Some(_)) => match found.get(&mark.get()) {
                None => (PathwayState::InPlace, Vec::new()),
                Some(findings) => (PathwayState::Incomplete, findings.clone()),
            },
        };
        PathwayReport {
            mark: mark.get(),
            name: pathway.and_then(|pathway| pathway.name.clone()),
            state,
            findings,
            fix: subject
                .mended
                .clone()
                .filter(|_| state == PathwayState::Incomplete),
            repairs: self.repairs.get(&mark.get()).copied(),
        }
    }
}

/// Remembers the last look.
#[derive(Debug)]
pub(super) struct Watch {
    firewall: Firewall,
    runtime_dir: RuntimeDir,
    last: Mutex<Option<Arc<Seen>>>,
}

impl Watch {
    /// Nothing seen yet.
    pub(super) fn new(firewall: Firewall, runtime_dir: RuntimeDir) -> Self {
        Self {
            firewall,
            runtime_dir,
            last: Mutex::default(),
        }
    }

    /// A look that is fresh enough. Those who ask meanwhile wait for the same one.
    pub(super) async fn look(&self, wanted: impl Iterator<Item = &Pathway>) -> Arc<Seen> {
        let by_mark: BTreeMap<_, _> = wanted.map(|one| (one.mark.get(), one)).collect();
        let wanted: Vec<Pathway> = by_mark.into_values().cloned().collect();
        let mut last = self.last.lock().await;
        if let Some(seen) = &*last
            && seen.at.elapsed() < FRESH
            && seen.wanted == wanted
        {
            return Arc::clone(seen);
        }
        let found = match pathway::check(&wanted, self.firewall).await {
            Ok(findings) => {
                let mut by_mark: BTreeMap<u32, Vec<String>> = BTreeMap::new();
                for finding in findings {
                    let of = by_mark.entry(finding.mark.get()).or_default();
                    of.push(finding.to_string());
                }
                Ok(by_mark)
            }
            Err(error) => Err(error.to_string()),
        };
        let seen = Arc::new(Seen {
            wanted,
            at: Instant::now(),
            found,
            // without them everything else is still worth showing
            repairs: repairs::by_pathway(&self.runtime_dir).unwrap_or_default(),
        });
        *last = Some(Arc::clone(&seen));
        seen
    }
}
