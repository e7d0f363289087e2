//! What to do about a pathway that is not in place: who makes it depends on where the relays come from.

use super::Patience;
use crate::config::Origin;
use crate::doctor::Diagnosis;
use crate::model::Mark;
use crate::pathway::piece::Step;
use crate::pathway::{Finding, Problem};

/// Who makes the pathways that a process needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Maker {
    /// `pathway add`, which reads the same files.
    Verb,
    /// The process, if it is told to: of relays that are in no file, `pathway add` knows neither what they
    /// listen on nor their targets.
    Flag,
    /// The process, as it was told to.
    Process,
}

impl Maker {
    /// For relays from there.
    pub(super) fn of(origin: &Origin, patience: Patience, manage_pathways: bool) -> Self {
        match origin {
            Origin::Files(_) => Self::Verb,
            // the old names have no such flag
            Origin::Standalone(_) if patience == Patience::GiveUp => Self::Verb,
            Origin::Standalone(_) if manage_pathways => Self::Process,
            Origin::Standalone(_) => Self::Flag,
        }
    }

    /// What mends a pathway.
    pub(super) fn mends(self, mark: Mark) -> String {
        match self {
            Self::Verb => format!("run mmproxyctl pathway add {mark}"),
            Self::Flag => "start it with --manage-pathways".to_owned(),
            Self::Process => "its process keeps it, see its log".to_owned(),
        }
    }

    /// What puts this in place.
    pub(super) fn puts(self, finding: &Finding) -> String {
        match self {
            Self::Verb => format!("run: {}", finding.fix()),
            Self::Flag => {
                let mut flags = self.mends(finding.mark);
                if let Problem::Missing(Step::TakeSwitch(_)) = finding.problem {
                    flags.push_str(" --set-sysctls");
                }
                flags
            }
            Self::Process => self.mends(finding.mark),
        }
    }

    /// What a diagnosis advises.
    pub(super) fn remedy(self, one: &Diagnosis) -> String {
        // nothing but the pathway is missing
        if let Some(mark) = one.fix.pathway.and_then(Mark::new)
            && self != Self::Verb
        {
            return self.mends(mark);
        }
        let on = one
            .fix
            .on
            .map(|on| format!("on {on}: "))
            .unwrap_or_default();
        match (&one.fix.commands[..], &one.fix.advice) {
            ([], Some(advice)) => advice.clone(),
            ([], None) => "mmproxyctl doctor shows more".to_owned(),
            (commands, _) => format!("{on}{}", commands.join(" && ")),
        }
    }
}
