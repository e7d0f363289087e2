//! Verdicts on evidence that was recorded on a healthy host, changed in one place each. What can be broken
//! for real is in tests/it/doctor; here is the rest, and what keeps verdicts apart.

use super::*;
use crate::doctor::evidence::{
    CannotSpoof, Conntrack, Entry, Missing, Networkd, Outcome, Ports, Relay, RelayError,
};
use crate::pathway::netlink::Answered;

/// Instances `local`, `container` and `local-udp` of the clinic, as `doctor --json` wrote it.
fn healthy() -> Evidence {
    serde_json::from_str(include_str!("healthy.json")).unwrap()
}

/// The faults after a change.
fn faults(change: impl FnOnce(&mut Evidence)) -> Vec<Fault> {
    let mut evidence = healthy();
    change(&mut evidence);
    let found = judge(&evidence).into_iter();
    found
        .filter(|one| one.severity == Severity::Fault)
        .map(|one| one.fault)
        .collect()
}

fn silent(evidence: &mut Evidence, instance: usize) {
    for target in &mut evidence.instances[instance].targets {
        target.spoofed = Outcome::Silent;
    }
}

fn missing(family: Option<crate::model::Family>) -> Missing {
    Missing {
        family,
        text: "IPv4 rule missing: …".to_owned(),
        unrouted: false,
        taken: false,
        sysctl: false,
    }
}

fn met(kind: &str, message: &str) -> impl FnOnce(&mut Evidence) {
    let error = RelayError {
        kind: kind.to_owned(),
        proxy: "10.0.0.9".parse().unwrap(),
        client: None,
        ago: 5,
        message: message.to_owned(),
        mended: false,
    };
    move |evidence| {
        evidence.instances[0].relay = Some(Relay {
            pid: 4711,
            descriptors: Some(1_048_576),
            descriptors_at_most: None,
            accept_pauses: 0,
            errors: vec![error],
        });
    }
}

#[test]
fn of_a_healthy_host_nothing_is_said() {
    assert_eq!(judge(&healthy()), []);
}

#[test]
fn one_change_one_fault() {
    type Change = Box<dyn FnOnce(&mut Evidence)>;
    let cases: Vec<(Fault, Change)> = vec![
        (
            Fault::KernelFeatureMissing,
            Box::new(|evidence| {
                evidence.host.cannot_spoof = Some(CannotSpoof {
                    operation: "set IP_TRANSPARENT".to_owned(),
                    errno: libc::ENOPROTOOPT,
                });
            }),
        ),
        (
            Fault::MissingCapability,
            Box::new(|evidence| {
                evidence.host.cannot_spoof = Some(CannotSpoof {
                    operation: "set IP_TRANSPARENT".to_owned(),
                    errno: libc::EPERM,
                });
            }),
        ),
        (
            Fault::KernelFeatureMissing,
            Box::new(|evidence| {
                let why = "the kernel refused to list the IPv4 rules: Operation not supported";
                evidence.pathways[0].unread = Some(why.to_owned());
            }),
        ),
        (
            Fault::Unreadable,
            Box::new(|evidence| {
                evidence.pathways[0].unread = Some("iptables is not installed".to_owned());
            }),
        ),
        (
            Fault::ConntrackFull,
            Box::new(|evidence| {
                evidence.host.conntrack = Some(Conntrack {
                    count: 262_144,
                    max: 262_144,
                });
                // the consequence is not a second fault
            }),
        ),
        (
            Fault::NetworkdRemovesRules,
            Box::new(|evidence| {
                evidence.host.networkd = Some(Networkd {
                    pid: 1,
                    removes_rules: true,
                    removes_routes: false,
                });
            }),
        ),
        (
            Fault::PathwayPieceMissing,
            Box::new(|evidence| {
                evidence.pathways[0].missing.push(missing(None));
                silent(evidence, 0);
                silent(evidence, 1);
            }),
        ),
        (
            Fault::PortsExhausted,
            Box::new(|evidence| {
                evidence.host.ports = Some(Ports {
                    range: (32_768, 60_999),
                    spoofed: 28_232,
                    taken: 28_232,
                });
                let target = &mut evidence.instances[0].targets[0];
                target.plain = Outcome::Failed(libc::EADDRNOTAVAIL);
                target.baseline = target.plain.clone();
                target.spoofed = Outcome::Failed(libc::EADDRNOTAVAIL);
            }),
        ),
        (
            Fault::NoWayBack,
            Box::new(|evidence| {
                silent(evidence, 1);
                for target in &mut evidence.instances[1].targets {
                    target.entry = Entry::Seen {
                        mark: 123,
                        state: "SYN_SENT".to_owned(),
                        replied: false,
                    };
                }
                evidence.instances[1].targets.truncate(1);
            }),
        ),
        (
            Fault::ProxyNotAllowed,
            Box::new(met("proxy-not-allowed", "refused")),
        ),
        (
            Fault::NoHeader,
            Box::new(met("no-header", "refused: this is an SSH banner")),
        ),
        (
            Fault::LateHeader,
            Box::new(met(
                "header-timeout",
                "refused: not a byte of a PROXY header within 5s",
            )),
        ),
        (
            Fault::NoHeader,
            Box::new(met(
                "header-timeout",
                "refused: no complete PROXY header within 5s",
            )),
        ),
        (
            Fault::DescriptorLimit,
            Box::new(|evidence| {
                met("", "")(evidence);
                evidence.instances[0].max_connections = Some(10_000);
                if let Some(relay) = &mut evidence.instances[0].relay {
                    relay.descriptors = Some(16_384);
                    relay.errors.clear();
                }
            }),
        ),
        (
            Fault::Unexplained,
            Box::new(|evidence| {
                silent(evidence, 0);
                evidence.instances[0].targets.truncate(1);
            }),
        ),
    ];
    for (fault, change) in cases {
        assert_eq!(faults(change), [fault]);
    }
}

#[test]
fn a_silent_target_without_a_way_back_is_impossible_behind_a_router() {
    let mut evidence = healthy();
    silent(&mut evidence, 1);
    let target = &mut evidence.instances[1].targets[0];
    target.entry = Entry::Seen {
        mark: 123,
        state: "SYN_SENT".to_owned(),
        replied: false,
    };
    target.forward = Answered {
        gateway: Some("10.0.0.1".parse().unwrap()),
        ..target.forward.clone()
    };
    evidence.instances[1].targets.truncate(1);
    let found = judge(&evidence);
    assert_eq!(found[0].fault, Fault::NoWayBack);
    assert_eq!(found[0].fix.commands, [""; 0]);
    let advice = found[0].fix.advice.as_deref().unwrap();
    assert!(advice.contains("impossible"), "{advice}");
}

#[test]
fn what_is_old_or_mended_is_not_said() {
    for (ago, mended) in [(3600, false), (5, true)] {
        let found = faults(|evidence| {
            met("no-header", "refused")(evidence);
            let relay = evidence.instances[0].relay.as_mut().unwrap();
            (relay.errors[0].ago, relay.errors[0].mended) = (ago, mended);
        });
        assert_eq!(found, []);
    }
}

#[test]
fn the_same_of_two_instances_is_said_once() {
    let mut evidence = healthy();
    evidence.pathways[0].missing.push(missing(None));
    let found = judge(&evidence);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].instances, ["local", "container", "local-udp"]);
    assert_eq!(found[0].fix.pathway, Some(123));
}

#[test]
fn leftovers_are_a_note() {
    let mut evidence = healthy();
    let step = "ip rule del priority 5 from 127.0.0.0/8 lookup 123 protocol 177";
    evidence.pathways[0].stale.push(step.to_owned());
    let found = judge(&evidence);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].severity, Severity::Note);
}
