//! Whether another program uses bits of a pathway's mark.
//!
//! Two things go wrong: the other takes our packets for its own, or it changes bits that we look at. A
//! line that looks for another whole mark, or sets one on packets of its own, does neither.

use super::{edits, names_of, pathways};
use crate::doctor::evidence::{Evidence, Pathway};
use crate::doctor::fault::{Diagnosis, Fault, Fix, Severity};
use crate::doctor::filters::{Action, FilterRule};
use crate::pathway::netlink::SeenRule;
use crate::pathway::piece::PROTOCOL;

/// One use of marks by another program.
struct Use {
    value: u32,
    mask: u32,
    sets: bool,
    program: &'static str,
    shown: String,
}

impl Use {
    /// How it clashes with a mark and mask. What looks for the very mark and mask of the pathway is there
    /// for it: an exception, or a route of its own.
    fn clash(&self, mark: u32, mask: u32) -> Option<&'static str> {
        let shared = self.mask & mask;
        let ours = (self.value ^ mark) & shared == 0;
        if shared == 0 {
            None
        } else if self.sets && self.mask != u32::MAX {
            Some("changes bits of it")
        } else if self.sets {
            ours.then_some("sets it on packets of its own")
        } else if (self.value, self.mask) == (mark, mask) {
            None
        } else {
            (ours && self.value & shared != 0).then_some("takes packets that carry it for its own")
        }
    }
}

/// Who may be behind a use of marks, by the chain's name or by the bits that the program is known for.
fn program(chain: &str, value: u32, mask: u32) -> &'static str {
    let named = [
        ("ts-", "Tailscale"),
        ("KUBE-", "kube-proxy"),
        ("cali-", "Calico"),
        ("CILIUM", "Cilium"),
        ("OLD_CILIUM", "Cilium"),
        ("ISTIO", "Istio"),
        ("DOCKER", "Docker"),
    ];
    let by_chain = named.iter().find(|(start, _)| chain.starts_with(start));
    match (by_chain, value, mask) {
        (Some((_, name)), ..) => name,
        (_, 0x539, u32::MAX) => "Istio",
        (_, _, 0x00ff_0000) => "Tailscale",
        (_, _, 0x4000 | 0x8000) => "kube-proxy",
        (_, _, 0x0f00 | 0x0e00 | 0xfe00) => "Cilium",
        (_, _, mask) if mask & 0xffff_0000 != 0 && mask & 0xffff == 0 => "Calico",
        _ => "another program",
    }
}

fn of_rule(rule: &SeenRule) -> Option<Use> {
    let (value, mask) = rule.selector.mark.filter(|_| rule.protocol != PROTOCOL)?;
    Some(Use {
        value,
        mask,
        sets: false,
        program: program("", value, mask),
        shown: format!("{} rule: {}", rule.family, rule.words(rule.priority)),
    })
}

fn of_filter(filter: &FilterRule) -> Vec<Use> {
    if filter.ours {
        return Vec::new();
    }
    let place = filter.place();
    let one = |value, mask, sets| Use {
        value,
        mask,
        sets,
        program: program(&filter.at.chain, value, mask),
        shown: format!("{place}: {}", filter.text),
    };
    let set = match filter.action {
        Action::SetMark(value, mask) => Some(one(value, mask, true)),
        _ => None,
    };
    let matched = filter.matches.mark.filter(|(_, _, inverted)| !inverted);
    let matched = matched.map(|(value, mask, _)| one(value, mask, false));
    set.into_iter().chain(matched).collect()
}

/// Clashes of every pathway.
pub(super) fn judge(evidence: &Evidence) -> Vec<Diagnosis> {
    let rules = evidence.host.rules.iter();
    let filters = evidence.host.filters.iter();
    evidence
        .pathways
        .iter()
        .filter_map(|pathway| {
            // the old scripts' rules look up the pathway's own table
            let rules = rules
                .clone()
                .filter(|rule| rule.table != Some(pathway.table));
            let uses: Vec<Use> = rules
                .filter_map(of_rule)
                .chain(filters.clone().flat_map(of_filter))
                .collect();
            of_pathway(evidence, pathway, &uses)
        })
        .collect()
}

fn of_pathway(evidence: &Evidence, pathway: &Pathway, uses: &[Use]) -> Option<Diagnosis> {
    let Pathway { mark, mask, .. } = *pathway;
    let clashes: Vec<(&Use, &str)> = uses
        .iter()
        .filter_map(|one| Some((one, one.clash(mark, mask)?)))
        .collect();
    // a program that has a name rather than one that has none
    let (first, what) = clashes
        .iter()
        .find(|(one, _)| one.program != "another program")
        .or(clashes.first())?;
    let theirs = clashes.iter().fold(0, |bits, (one, _)| bits | one.mask);
    let free = |mark, mask| uses.iter().all(|one| one.clash(mark, mask).is_none());
    let narrower = mask & !theirs;
    // as narrow as the mark allows, else everything but their bits
    let masks = [u32::MAX >> mark.leading_zeros(), narrower];
    let fits = |narrow: &&u32| mark & **narrow == mark && **narrow != mask && free(mark, **narrow);
    let fix = if let Some(narrow) = masks.iter().find(fits) {
        pathways::with_option(evidence, pathway, "mask", &format!("{narrow:#x}"))
    } else {
        let used = |mark| evidence.pathways.iter().any(|other| other.mark == mark);
        match (100..=0xff).find(|&mark| !used(mark) && free(mark, 0xff)) {
            Some(mark) => {
                let mut commands = edits::set_mark(evidence, pathway, mark);
                // a mask= that was written out is one for the old mark
                let usual = if pathway.mark <= 0xff { 0xff } else { u32::MAX };
                if pathway.mask != usual && pathway.configured {
                    commands.insert(1, edits::set_option(evidence, pathway, "mask", "0xff"));
                }
                let all = evidence.instances.iter();
                let mut running = all.filter(|instance| instance.mark == pathway.mark);
                commands.extend(running.find_map(|one| edits::reload(evidence, one)));
                Fix::run(commands)
            }
            None => Fix::advise("give the pathway a mark and a mask= whose bits nobody else uses"),
        }
    };
    Some(Diagnosis {
        fault: Fault::MarkOverlap,
        severity: Severity::Fault,
        instances: names_of(evidence, pathway),
        verdict: format!(
            "mark {mark} with mask {mask:#x} overlaps with {} ({:#x}/{:#x}), which {what}",
            first.program, first.value, first.mask
        ),
        evidence: clashes.iter().map(|(one, _)| one.shown.clone()).collect(),
        fix,
    })
}
