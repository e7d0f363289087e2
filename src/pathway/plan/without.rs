//! Pathways without a firewall (`--firewall none`): what the kernel can do alone, and what it cannot. Pure.
//!
//! With `tcp_fwmark_accept` on, an accepted TCP connection takes its mark from the packet that opened
//! it, which still has it where that packet came over `lo`: from the relay to an address of this host.

use std::collections::BTreeSet;

use crate::model::{ConnmarkMode, Mark, Pathway};
use crate::pathway::piece::{SWITCH, Step, SwitchStep};

use super::wanted::needs_switch;
use super::{Change, Conflict, Facts, Goal, Outcome, Present};

/// What the kernel cannot do alone for a pathway.
pub(super) fn refusal(pathway: &Pathway, facts: &Facts) -> Option<Conflict> {
    let mark = pathway.mark;
    if let Some(&interception) = pathway.interceptions.first() {
        return Some(Conflict::Interception { mark, interception });
    }
    let needs = needs_switch(pathway, facts);
    if !pathway.udp.is_empty() && (needs || pathway.connmark == ConnmarkMode::Always) {
        let names: Vec<_> = pathway.udp.iter().map(ToString::to_string).collect();
        return Some(Conflict::Udp {
            mark,
            instances: names.join(", "),
        });
    }
    let far = pathway.targets.iter().find(|target| !facts.is_own(target));
    if needs && let Some(target) = far {
        return Some(Conflict::Far {
            mark,
            target: target.to_string(),
        });
    }
    None
}

/// Who takes the switch and who leaves it, or why it cannot be taken.
pub(super) fn switch(
    goal: Goal,
    pathways: &[Pathway],
    facts: &Facts,
    present: &Present,
) -> Result<Vec<Change>, Conflict> {
    let ours = present.switch.ours.clone();
    let on = present.switch.on == Some(true);
    let needs = |pathway: &Pathway| goal == Goal::Add && needs_switch(pathway, facts);
    let mut changes = Vec::new();
    let mut turned = on;
    for pathway in pathways.iter().filter(|pathway| needs(pathway)) {
        let mark = pathway.mark;
        let known = ours.as_ref().is_none_or(|marks| marks.contains(&mark));
        if turned && known && on {
            continue;
        }
        if present.switch.on.is_none() {
            return Err(Conflict::NoSwitch { mark });
        }
        if !on && !facts.may_set_sysctls {
            return Err(Conflict::Switch { mark });
        }
        let step = SwitchStep {
            mark,
            turns: !turned,
        };
        changes.push(change(Outcome::Added, mark, Step::TakeSwitch(step)));
        turned = true;
    }
    let leaving: Vec<Mark> = pathways
        .iter()
        .filter(|pathway| !needs(pathway))
        .map(|pathway| pathway.mark)
        .filter(|mark| ours.as_ref().is_some_and(|marks| marks.contains(mark)))
        .collect();
    let stays = ours.is_some_and(|marks: BTreeSet<Mark>| marks.len() > leaving.len())
        || !changes.is_empty();
    let last = leaving.len().saturating_sub(1);
    for (index, mark) in leaving.into_iter().enumerate() {
        let step = SwitchStep {
            mark,
            turns: turned && !stays && index == last,
        };
        changes.push(change(Outcome::Removed, mark, Step::LeaveSwitch(step)));
    }
    Ok(changes)
}

fn change(outcome: Outcome, mark: Mark, command: Step) -> Change {
    Change {
        mark,
        outcome,
        leftover: false,
        command,
    }
}

/// What a person should know of these changes.
pub(super) fn notes(changes: &[Change]) -> Option<String> {
    changes.iter().find_map(|change| match change.command {
        Step::TakeSwitch(SwitchStep { turns: true, .. }) => Some(format!(
            "{SWITCH} is set to 1, for all of this host's TCP connections: each takes over the mark of \
             the packet that opened it; 'pathway del' sets it back to 0"
        )),
        Step::LeaveSwitch(SwitchStep { turns: true, .. }) => {
            Some(format!("{SWITCH} is set back to 0"))
        }
        _ => None,
    })
}
