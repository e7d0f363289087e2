//! Whether the kernel holds what the pathways want.

use super::{command, edits, every_name, names_of};
use crate::doctor::evidence::{CannotSpoof, Evidence, Missing, Outcome, Pathway, Target};
use crate::doctor::fault::{Diagnosis, Fault, Fix, Severity};
use crate::model::{Family, Priority};

/// No spoofing: nothing else can be told.
pub(super) fn cannot_spoof(evidence: &Evidence, cannot: &CannotSpoof) -> Diagnosis {
    let CannotSpoof { operation, errno } = cannot;
    let said = std::io::Error::from_raw_os_error(*errno);
    let denied = *errno == libc::EPERM;
    without_spoofing(
        evidence,
        denied,
        operation,
        vec![format!("cannot {operation}: {said}")],
    )
}

fn without_spoofing(
    evidence: &Evidence,
    denied: bool,
    operation: &str,
    seen: Vec<String>,
) -> Diagnosis {
    Diagnosis {
        fault: if denied {
            Fault::MissingCapability
        } else {
            Fault::KernelFeatureMissing
        },
        severity: Severity::Fault,
        instances: every_name(evidence),
        verdict: if denied {
            "CAP_NET_ADMIN is missing: no pathway can be looked at, and no relay can run".to_owned()
        } else {
            format!("this kernel cannot {operation}: no client's address can be kept")
        },
        evidence: seen,
        fix: if denied {
            let doctor = command(evidence, "doctor");
            Fix::run([format!("sudo {doctor}")])
                .knowing("a relay under systemd gets it with AmbientCapabilities=CAP_NET_ADMIN")
        } else {
            Fix::advise(
                "run a kernel with CONFIG_INET and CONFIG_IP_MULTIPLE_TABLES, or outside of a sandbox (gVisor, a seccomp filter) that lacks it",
            )
        },
    }
}

/// What is wrong with each pathway.
pub(super) fn judge(evidence: &Evidence) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    for pathway in &evidence.pathways {
        if let Some(why) = &pathway.unread {
            found.push(unread(evidence, pathway, why));
        }
        found.extend(ipv6(evidence, pathway));
        match pathway.missing.iter().find(|piece| piece.taken) {
            // nothing can be put in place before that is settled
            Some(taken) => found.push(table_taken(evidence, pathway, taken)),
            None => {
                let missing = pathway.missing.iter();
                found.extend(missing.map(|piece| missing_piece(evidence, pathway, piece)));
            }
        }
        found.extend(stale(evidence, pathway));
    }
    found
}

fn add(evidence: &Evidence, pathway: &Pathway) -> Fix {
    let mark = pathway.mark;
    Fix {
        pathway: Some(mark),
        ..Fix::run([command(evidence, &format!("pathway add {mark}"))])
    }
}

fn unread(evidence: &Evidence, pathway: &Pathway, why: &str) -> Diagnosis {
    // CAP_NET_RAW alone may spoof
    if why.contains("CAP_NET_ADMIN") {
        return without_spoofing(evidence, true, "", vec![why.to_owned()]);
    }
    let lacks = [
        "not supported",
        "missing kernel module",
        "Protocol not available",
    ];
    let feature = lacks.iter().any(|text| why.contains(text));
    Diagnosis {
        fault: if feature {
            Fault::KernelFeatureMissing
        } else {
            Fault::Unreadable
        },
        severity: Severity::Fault,
        instances: names_of(evidence, pathway),
        verdict: if feature {
            format!("this kernel lacks what a pathway needs: {why}")
        } else {
            format!("the pathways could not be looked at: {why}")
        },
        evidence: Vec::new(),
        fix: Fix::advise(if feature {
            "load or build in policy routing (CONFIG_IP_MULTIPLE_TABLES, CONFIG_IPV6_MULTIPLE_TABLES) and CONNMARK (xt_connmark, or nft_ct)"
        } else {
            "mend what it says, then ask again"
        }),
    }
}

fn ipv6(evidence: &Evidence, pathway: &Pathway) -> Option<Diagnosis> {
    let concerned: Vec<String> = evidence
        .instances
        .iter()
        .filter(|instance| instance.mark == pathway.mark)
        .filter(|instance| instance.targets.iter().any(|one| one.family == Family::V6))
        .map(|instance| instance.name.clone())
        .collect();
    if evidence.host.ipv6 || concerned.is_empty() {
        return None;
    }
    let switch = |name: &str| format!("net.ipv6.conf.{name}.disable_ipv6");
    let on = |name: &str| {
        evidence
            .host
            .sysctls
            .get(&switch(name))
            .is_some_and(|value| value == "1")
    };
    let name = if on("all") { "all" } else { "lo" };
    let fix = if on(name) {
        let mut fix = add(evidence, pathway);
        fix.commands
            .insert(0, format!("sysctl -w {}=0", switch(name)));
        // --fix changes no sysctl
        fix.pathway = None;
        fix
    } else {
        Fix::advise("boot without ipv6.disable=1, or write - into the column target_ipv6")
    };
    Some(Diagnosis {
        fault: Fault::Ipv6Disabled,
        severity: Severity::Fault,
        instances: concerned,
        verdict: "IPv6 is switched off on this host: IPv6 clients are not served".to_owned(),
        evidence: vec![format!("{} is not 0", switch("lo"))],
        fix,
    })
}

fn missing_piece(evidence: &Evidence, pathway: &Pathway, piece: &Missing) -> Diagnosis {
    let family = piece.family.map(|family| family.to_string());
    let mut seen = Vec::new();
    let targets = evidence
        .instances
        .iter()
        .filter(|instance| instance.mark == pathway.mark)
        .flat_map(|instance| &instance.targets)
        .filter(|target| piece.family.is_none_or(|family| family == target.family));
    for Target {
        address,
        spoofed,
        client,
        ..
    } in targets
    {
        if matches!(spoofed, Outcome::Silent | Outcome::Failed(_)) {
            seen.push(format!(
                "a spoofed connection from {client} to {address} gets no answer"
            ));
        }
    }
    seen.dedup();
    let fix = if piece.sysctl {
        let mark = pathway.mark;
        Fix::run([command(
            evidence,
            &format!("pathway add {mark} --set-sysctls"),
        )])
    } else {
        add(evidence, pathway)
    };
    Diagnosis {
        fault: if piece.unrouted {
            Fault::NoDefaultRoute
        } else {
            Fault::PathwayPieceMissing
        },
        severity: Severity::Fault,
        instances: names_of(evidence, pathway),
        verdict: if piece.unrouted {
            format!(
                "this host has no {} default route, and what stands in for it is missing: {}",
                family.unwrap_or_default(),
                piece.text
            )
        } else {
            format!("pathway {}: {}", pathway.mark, piece.text)
        },
        evidence: seen,
        fix,
    }
}

fn table_taken(evidence: &Evidence, pathway: &Pathway, taken: &Missing) -> Diagnosis {
    let used = |table: u32| {
        let mut rules = evidence.host.rules.iter();
        rules.any(|rule| rule.table == Some(table))
            || evidence.pathways.iter().any(|other| other.table == table)
    };
    let fix = match (1000 + pathway.mark % 1000..10_000).find(|&table| !used(table)) {
        Some(table) => with_option(evidence, pathway, "table", &table.to_string()),
        None => Fix::advise("give the pathway a table= that nobody uses"),
    };
    Diagnosis {
        fault: Fault::TableTaken,
        severity: Severity::Fault,
        instances: names_of(evidence, pathway),
        verdict: taken.text.clone(),
        evidence: Vec::new(),
        fix,
    }
}

fn stale(evidence: &Evidence, pathway: &Pathway) -> Option<Diagnosis> {
    let first = pathway.stale.first()?;
    let unmarked = pathway.priority + Priority::UNMARKED_STEP;
    let rule = format!("ip rule del priority {unmarked} from 127.0.0.0/8");
    let mut switches = evidence.host.sysctls.iter();
    let switch = switches.find(|(name, value)| name.ends_with(".route_localnet") && *value != "0");
    let harmful = pathway.stale.iter().any(|step| step.starts_with(&rule));
    Some(match switch {
        Some((switch, _)) if harmful => Diagnosis {
            fault: Fault::RouteLocalnet,
            severity: Severity::Fault,
            instances: names_of(evidence, pathway),
            verdict: format!(
                "{switch} is on: the unmarked rule at priority {unmarked} now catches answers to clients that are DNATed to 127.0.0.1"
            ),
            evidence: pathway.stale.clone(),
            fix: add(evidence, pathway),
        },
        _ => Diagnosis {
            fault: Fault::PathwayPieceMissing,
            severity: Severity::Note,
            instances: names_of(evidence, pathway),
            verdict: format!(
                "pathway {}: {} leftovers, the first: {first}",
                pathway.mark,
                pathway.stale.len()
            ),
            evidence: pathway.stale.clone(),
            fix: add(evidence, pathway),
        },
    })
}

/// The commands that give a pathway an option and put it in place.
pub(super) fn with_option(evidence: &Evidence, pathway: &Pathway, key: &str, value: &str) -> Fix {
    Fix::run([
        edits::set_option(evidence, pathway, key, value),
        command(evidence, &format!("pathway add {}", pathway.mark)),
    ])
}
