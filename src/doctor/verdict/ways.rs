//! One target of one instance: is the service there, do packets come back, and if not, what keeps them.

mod service;

use std::net::SocketAddr;

use super::firewalls::{culprit, exception, packets};
use super::{command, pathway_of, pathways};
use crate::doctor::evidence::{Entry, Evidence, Instance, Outcome, Pathway, Place, Target};
use crate::doctor::fault::{Diagnosis, Fault, Fix, Severity};
use crate::doctor::filters::{Action, FilterRule};
use crate::doctor::gather::forgot;
use crate::model::{Family, Priority};

/// Everything about one target, together.
struct Way<'e> {
    evidence: &'e Evidence,
    instance: &'e Instance,
    target: &'e Target,
    pathway: &'e Pathway,
}

/// What is wrong with the ways to a target and back.
pub(super) fn judge(evidence: &Evidence, instance: &Instance, target: &Target) -> Vec<Diagnosis> {
    let Some(pathway) = pathway_of(evidence, instance) else {
        return Vec::new();
    };
    if target.family == Family::V6 && !evidence.host.ipv6 {
        // said of the pathway
        return Vec::new();
    }
    let way = Way {
        evidence,
        instance,
        target,
        pathway,
    };
    let service = way.docker_proxy().or_else(|| way.service());
    let there = service.is_none();
    let mut found: Vec<_> = service.into_iter().collect();
    found.extend(way.shadow());
    if there {
        found.extend(way.wildcard());
        // causes that the routing shows come first: a time-out needs no other explanation then
        let explained = !found.is_empty() || way.piece_is_missing();
        if way.is_broken() && !explained {
            found.push(way.broken());
        }
        found.extend(way.singled_out());
    }
    found
}

impl Way<'_> {
    fn diagnosis(
        &self,
        fault: Fault,
        verdict: String,
        evidence: Vec<String>,
        fix: Fix,
    ) -> Diagnosis {
        Diagnosis {
            fault,
            severity: Severity::Fault,
            instances: vec![self.instance.name.clone()],
            verdict,
            evidence,
            fix,
        }
    }

    fn address(&self) -> SocketAddr {
        self.target.address
    }

    fn is_local(&self) -> bool {
        matches!(self.target.place, Place::Loopback | Place::Own)
    }

    fn is_udp(&self) -> bool {
        self.instance.protocol == "udp"
    }

    /// Whether a missing piece of the pathway may be why.
    fn piece_is_missing(&self) -> bool {
        let family = self.target.family;
        let mut missing = self.pathway.missing.iter();
        self.pathway.unread.is_some()
            || missing.any(|piece| piece.family.is_none_or(|of| of == family))
    }

    /// Whether what comes back to this host does not come back to a client.
    fn is_broken(&self) -> bool {
        let Target {
            baseline, spoofed, ..
        } = self.target;
        match (baseline, spoofed) {
            (Outcome::Open(_), spoofed) => !matches!(spoofed, Outcome::Open(_)),
            (Outcome::Refused, spoofed) => !spoofed.came_back(),
            // this host gets no answer either: only where it should have one
            _ => !self.is_udp() && !spoofed.came_back(),
        }
    }

    /// What was seen of the probes.
    fn seen(&self) -> Vec<String> {
        let Target {
            client,
            place,
            plain,
            baseline,
            spoofed,
            entry,
            marked,
            unmarked,
            ..
        } = self.target;
        let address = self.address();
        let mut seen = Vec::new();
        if self.is_udp() && !self.is_local() {
            seen.push(format!(
                "a datagram from this host to {address}: {}",
                said(plain)
            ));
        }
        if self.is_udp() {
            seen.push(format!(
                "a closed port of {}, from this host: {}",
                address.ip(),
                said(baseline)
            ));
            seen.push(format!(
                "the same from {client} with the mark: {}",
                said(spoofed)
            ));
        } else {
            seen.push(format!(
                "a connection from this host to {address}: {}",
                said(plain)
            ));
            seen.push(format!(
                "from {client} with mark {}: {}",
                self.pathway.mark,
                said(spoofed)
            ));
        }
        seen.push(match entry {
            Entry::Unknown => "connection tracking could not be asked about it".to_owned(),
            Entry::Absent => "connection tracking knows nothing of it".to_owned(),
            Entry::Seen {
                mark,
                state,
                replied,
            } => format!(
                "connection tracking has it with mark {mark}{}{}",
                if state.is_empty() {
                    String::new()
                } else {
                    format!(", {state}")
                },
                if *replied { "" } else { ", no answer seen" }
            ),
        });
        seen.push(format!("route of the answer with the mark: {marked}"));
        if *place != Place::Remote {
            seen.push(format!("without the mark: {unmarked}"));
        }
        seen
    }

    /// A rule of another program that stands before ours and takes answers away.
    fn shadow(&self) -> Option<Diagnosis> {
        let shadow = self.target.shadows.first()?;
        let rule = self.evidence.host.rules.get(shadow.rule)?;
        let behind = Priority::UNMARKED_STEP + 1;
        let ip = match rule.family {
            Family::V4 => "ip rule",
            Family::V6 => "ip -6 rule",
        };
        let words = rule.words(rule.priority);
        let seen = vec![
            format!("{} rule: {words}", rule.family),
            format!(
                "answer to {} with the mark: {}",
                shadow.clients, shadow.answer
            ),
        ];
        let ours = self.pathway.priority;
        Some(
            if rule.priority > behind && ours > Priority::DEFAULT.get() {
                let priority = Priority::DEFAULT.get().min(rule.priority - behind);
                self.diagnosis(
                Fault::PriorityBehindForeignRules,
                format!(
                    "pathway {} has priority {ours}, behind another program's {} rule at {}, which takes its answers",
                    self.pathway.mark, rule.family, rule.priority
                ),
                seen,
                pathways::with_option(self.evidence, self.pathway, "priority", &priority.to_string()),
            )
            } else {
                let moved = rule.words(ours + behind);
                self.diagnosis(
                Fault::ForeignRuleShadows,
                format!(
                    "another program's {} rule at priority {} comes before pathway {} and takes its answers",
                    rule.family, rule.priority, self.pathway.mark
                ),
                seen,
                Fix::run([format!("{ip} add {moved}"), format!("{ip} del {words}")])
                    .knowing("and have the program that made it put it there"),
            )
            },
        )
    }

    /// Packets do not come back, and no piece of the pathway is missing.
    fn broken(&self) -> Diagnosis {
        self.not_tracked()
            .or_else(|| self.dropped())
            .or_else(|| self.reverse_path())
            .or_else(|| self.no_way_back())
            .unwrap_or_else(|| self.unexplained())
    }

    fn dropped(&self) -> Option<Diagnosis> {
        let packets = packets(self.instance, self.target, self.pathway);
        let rule = culprit(self.evidence, &packets, &Action::Drop)?;
        Some(self.drop_by(rule, None))
    }

    /// A line drops the relay's packets, or the answers; of some clients only, where they are named.
    fn drop_by(&self, rule: &FilterRule, clients: Option<String>) -> Diagnosis {
        let packets: Vec<_> = packets(self.instance, self.target, self.pathway)
            .into_iter()
            .map(|mut packet| {
                // the line is about others than the client of the probe
                if let (Some(_), Some(source), false) =
                    (&clients, rule.matches.source, packet.answer)
                {
                    packet.from = source.net.addr();
                }
                packet
            })
            .collect();
        let commands = exception(rule, &packets, self.target, self.pathway);
        let fix = if commands.is_empty() {
            Fix::advise("make an exception before this line")
        } else {
            Fix::run(commands)
        };
        let place = rule.place();
        let who = clients.unwrap_or_default();
        let (what, of) = match self.target.place {
            Place::Remote => ("packets to or from", "this target"),
            Place::Own => ("the relay's packets on lo to", "this target"),
            _ => ("the relay's packets on lo to", "loopback targets"),
        };
        let mut found = self.diagnosis(
            Fault::FirewallDrop,
            format!("{place} drops {what} {of}{who}: {}", rule.text),
            self.seen(),
            fix,
        );
        if let Some(met) = rule.met().filter(|met| *met > 0) {
            found
                .evidence
                .push(format!("it met {met} packets while the probes ran"));
        }
        found
    }

    fn not_tracked(&self) -> Option<Diagnosis> {
        // the request, or only its answer
        let half = matches!(self.target.entry, Entry::Seen { replied: false, .. });
        if (self.target.entry != Entry::Absent && !half) || !self.pathway.connmark {
            return None;
        }
        let packets = packets(self.instance, self.target, self.pathway);
        let rule = culprit(self.evidence, &packets, &Action::NoTrack)?;
        let all = self.evidence.host.filters.iter();
        let mut commands: Vec<String> = all
            .filter(|rule| rule.action == Action::NoTrack)
            .flat_map(|rule| exception(rule, &packets, self.target, self.pathway))
            .collect();
        commands.dedup();
        Some(self.diagnosis(
            Fault::NotTracked,
            format!(
                "{} keeps connection tracking from the connections to {}, which their mark depends on: {}",
                rule.place(),
                self.address(),
                rule.text
            ),
            self.seen(),
            Fix::run(commands),
        ))
    }

    fn reverse_path(&self) -> Option<Diagnosis> {
        if self.target.place != Place::Remote || self.evidence.host.rp_filter_drops == 0 {
            return None;
        }
        let dropped = format!(
            "reverse-path filtering dropped {} packets while the probes ran (IPReversePathFilter)",
            self.evidence.host.rp_filter_drops
        );
        let mut seen = self.seen();
        seen.push(dropped);
        seen.push(format!(
            "route to the target with the mark: {}",
            self.target.forward
        ));
        let switch = |name: &str| self.evidence.host.sysctls.get(name).map(String::as_str);
        // the mark leads to the target and nothing else does: only with it is the way back the same
        let by_mark = !matches!(self.target.plain, Outcome::Open(_))
            && self.marked_way()
            && switch("net.ipv4.conf.all.src_valid_mark") != Some("1");
        Some(if by_mark {
            self.diagnosis(
                Fault::SrcValidMark,
                format!(
                    "reverse-path filtering drops the answers of {}: the way there depends on the mark, and src_valid_mark is 0",
                    self.address()
                ),
                seen,
                Fix::run(["sysctl -w net.ipv4.conf.all.src_valid_mark=1".to_owned()]),
            )
        } else {
            self.diagnosis(
                Fault::RpFilter,
                format!(
                    "strict reverse-path filtering (rp_filter=1) drops the answers of {}: they come in by another interface",
                    self.address()
                ),
                seen,
                Fix::run(["sysctl -w net.ipv4.conf.all.rp_filter=2".to_owned()]),
            )
        })
    }

    /// Whether a rule for the mark chooses the way to the target.
    fn marked_way(&self) -> bool {
        let main = [Some(254), Some(255), None];
        !main.contains(&self.target.forward.table)
            && self.target.forward.table != Some(self.pathway.table)
    }

    fn no_way_back(&self) -> Option<Diagnosis> {
        let Target {
            place,
            marked,
            forward,
            entry,
            client,
            ..
        } = self.target;
        let unanswered = match entry {
            Entry::Seen { replied, .. } => !replied,
            // without connection tracking nothing tells it from a lost answer
            _ => !self.pathway.connmark,
        };
        if *place != Place::Remote || !marked.is_local() || !unanswered {
            return None;
        }
        let address = self.address();
        let (ip, port) = (address.ip(), address.port());
        let mut seen = self.seen();
        seen.push(format!(
            "{ip} answers this host, and {client} not through this host"
        ));
        let mut switches = self.evidence.host.sysctls.iter();
        let strict = switches.find(|(name, value)| name.ends_with(".rp_filter") && *value == "1");
        seen.extend(strict.map(|(name, _)| {
            format!("unless it does, by another interface: {name}=1 drops what comes in so, unseen by anybody")
        }));
        let family = if ip.is_ipv4() { "ip" } else { "ip -6" };
        let fix = match (forward.source, forward.gateway) {
            (Some(here), None) => Fix {
                on: Some(ip),
                ..Fix::run([
                    format!(
                        "{family} route replace default via {here} table {}",
                        self.pathway.table
                    ),
                    format!(
                        "{family} rule add from {ip} ipproto {} sport {port} lookup {}",
                        self.instance.protocol, self.pathway.table
                    ),
                ])
            }
            .knowing("or make this host its default gateway"),
            _ => Fix::advise(
                "impossible without source routing on the routers in between: run the relay on the service's own host",
            ),
        };
        Some(self.diagnosis(
            Fault::NoWayBack,
            format!("{ip} is on another host that sends its answers to clients elsewhere"),
            seen,
            fix,
        ))
    }

    fn unexplained(&self) -> Diagnosis {
        let mut seen = self.seen();
        if forgot(&self.target.entry, self.pathway.mark, self.pathway.mask) {
            seen.push("something changes the connection's mark".to_owned());
        }
        seen.extend(
            self.evidence
                .host
                .unseen
                .iter()
                .map(|what| format!("not looked at: {what}")),
        );
        self.diagnosis(
            Fault::Unexplained,
            format!(
                "spoofed connections to {} get no answer although the pathway is in place",
                self.address()
            ),
            seen,
            Fix::advise(format!(
                "trace one: nft monitor trace, or tcpdump -ni any port {}; then {}",
                self.address().port(),
                command(
                    self.evidence,
                    &format!("pathway check {}", self.pathway.mark)
                )
            )),
        )
    }

    /// Clients that a firewall line singles out, while others come through.
    fn singled_out(&self) -> Vec<Diagnosis> {
        let Target { singled_out, .. } = self.target;
        let lost = singled_out.iter().filter(|one| {
            !one.outcome.came_back() && !self.is_broken() && !self.piece_is_missing()
        });
        lost.filter_map(|one| {
            let rule = self.evidence.host.filters.get(one.filter)?;
            let clients = one.clients;
            let mut found = self.drop_by(rule, Some(format!(" from clients in {clients}")));
            found.evidence.truncate(2);
            found.evidence.push(format!(
                "a spoofed connection from {clients}: {}",
                said(&one.outcome)
            ));
            // a proxy there is such a client itself: what it sends with LOCAL or UNKNOWN has its own address
            let proxies = self.instance.allow.iter().find(|proxy| {
                let narrow = proxy.prefix_len() > 0;
                narrow && (clients.contains(&proxy.addr()) || proxy.contains(&clients.addr()))
            });
            let errors = self.instance.relay.iter().flat_map(|relay| &relay.errors);
            let mut lost = errors.filter_map(|error| error.client);
            let met = lost.find(|client| clients.contains(client));
            match (proxies, met) {
                (_, Some(client)) => found
                    .evidence
                    .push(format!("client {client} was lost lately")),
                (Some(proxy), None) => found.evidence.push(format!(
                    "proxy {proxy} is one of them: its own connections (health checks) are lost"
                )),
                (None, None) => found.severity = Severity::Note,
            }
            Some(found)
        })
        .collect()
    }
}

fn error(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

fn said(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Untried => "not tried".to_owned(),
        Outcome::Open(_) => "open".to_owned(),
        Outcome::Refused => "refused".to_owned(),
        Outcome::Silent => "no answer".to_owned(),
        Outcome::Failed(errno) => error(*errno),
    }
}
