//! One target of one instance: is the service there, do packets come back, and if not, what keeps them.

use std::net::SocketAddr;

use super::firewalls::{culprit, exception, packets};
use super::{command, edits, pathway_of, pathways};
use crate::doctor::evidence::{
    Entry, Evidence, Instance, Listener, Outcome, Pathway, Place, Process, Target,
};
use crate::doctor::fault::{Diagnosis, Fault, Fix, Severity};
use crate::doctor::filters::{Action, FilterRule};
use crate::doctor::gather::{covers, forgot};
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

    /// docker-proxy on the target's port: the service sees docker-proxy's address, whoever the client.
    fn docker_proxy(&self) -> Option<Diagnosis> {
        if !self.is_local() {
            return None;
        }
        let address = self.address();
        let (listener, process) = self.target.listeners.iter().find_map(|listener| {
            let process = listener.process.as_ref()?;
            (covers(listener.address, address) && process.name == "docker-proxy")
                .then_some((listener, process))
        })?;
        let container = container(process);
        let verdict = match container {
            Some(container) => format!(
                "docker-proxy listens on {}: the service would see its address; the container is {container}",
                listener.address
            ),
            None => format!(
                "docker-proxy listens on {}: the service would see its address",
                listener.address
            ),
        };
        let fix = match container {
            Some(container) if container.is_ipv4() == address.is_ipv4() => {
                Fix::run(edits::set_target(self.evidence, self.instance, container))
            }
            _ => {
                Fix::advise("write the container's own address (docker inspect) into instances.tsv")
            }
        };
        let seen = vec![format!(
            "pid {}: {}",
            process.pid,
            process.arguments.join(" ")
        )];
        Some(self.diagnosis(Fault::DockerProxy, verdict, seen, fix))
    }

    /// Whether the service is there.
    fn service(&self) -> Option<Diagnosis> {
        let address = self.address();
        let protocol = &self.instance.protocol;
        match &self.target.plain {
            Outcome::Refused => Some(self.elsewhere().unwrap_or_else(|| {
                self.diagnosis(
                    Fault::ServiceDown,
                    format!("nobody listens at {protocol} {address}"),
                    vec![format!("from this host: {}", said(&self.target.plain))],
                    Fix::advise("start the service, or correct the target"),
                )
            })),
            Outcome::Failed(libc::EADDRNOTAVAIL) => self.ports(),
            Outcome::Failed(errno) if self.target.place == Place::Nowhere => Some(self.diagnosis(
                Fault::TargetSilent,
                format!("no route leads to {address}: {}", error(*errno)),
                Vec::new(),
                Fix::advise("bring up the interface that leads there, or correct the target"),
            )),
            // some ways are open to marked packets only
            Outcome::Silent | Outcome::Failed(_)
                if !self.is_udp() && !matches!(self.target.spoofed, Outcome::Open(_)) =>
            {
                Some(self.silent())
            }
            _ => None,
        }
    }

    /// The service is on the port, and at another address of this host.
    fn elsewhere(&self) -> Option<Diagnosis> {
        let address = self.address();
        let mut listeners = self.target.listeners.iter();
        let other = listeners.find(|one| {
            self.is_local()
                && one.address.is_ipv4() == address.is_ipv4()
                && !covers(one.address, address)
        })?;
        let process = match &other.process {
            Some(process) => format!("{}, pid {}", process.name, process.pid),
            None => "a process that cannot be seen".to_owned(),
        };
        let bound = other.address;
        Some(
            self.diagnosis(
                Fault::ServiceElsewhere,
                format!("the service listens at {bound}, not at {address}"),
                vec![process],
                Fix::run(edits::set_target(self.evidence, self.instance, bound))
                    .knowing("or have the service listen there, too"),
            ),
        )
    }

    fn ports(&self) -> Option<Diagnosis> {
        let ports = self.evidence.host.ports?;
        let (from, to) = ports.range;
        let wider = (from.min(10_000), 60_999.max(to));
        let mut fix = Fix::run([format!(
            "sysctl -w net.ipv4.ip_local_port_range='{} {}'",
            wider.0, wider.1
        )]);
        if self.instance.keeps_ports {
            fix = fix.knowing(
                "instances with port=any, and kernels from 6.3 on, leave the host its ports",
            );
        }
        Some(
            self.diagnosis(
                Fault::PortsExhausted,
                "this host cannot connect any more: sockets with clients' addresses hold its ports"
                    .to_owned(),
                vec![format!(
                    "of ports {from} to {to}, {} are taken, {} by spoofed sockets",
                    ports.taken, ports.spoofed
                )],
                fix,
            ),
        )
    }

    /// Not even this host gets an answer.
    fn silent(&self) -> Diagnosis {
        if let Some(found) = self.dropped().or_else(|| self.reverse_path()) {
            return found;
        }
        self.diagnosis(
            Fault::TargetSilent,
            format!(
                "{} does not answer, not even this host: {}",
                self.address(),
                said(&self.target.plain)
            ),
            self.seen(),
            Fix::advise("look at the target: is it up, does its own firewall drop"),
        )
    }

    /// A wildcard UDP service answers from the address that the kernel picks.
    fn wildcard(&self) -> Option<Diagnosis> {
        let address = self.address();
        if !self.is_udp() || !self.is_local() {
            return None;
        }
        let bound = |one: &&Listener| covers(one.address, address);
        let listeners = || self.target.listeners.iter().filter(bound);
        let exact = listeners().any(|one| one.address.ip().to_canonical() == address.ip());
        let wildcard = listeners().next().filter(|_| !exact)?;
        let chosen = self.target.chosen.source;
        if chosen == Some(address.ip()) {
            return None;
        }
        let verdict = match chosen {
            Some(chosen) => format!(
                "the UDP service at {address} is bound to {}: it answers from {chosen}, and the answer goes to the real client",
                wildcard.address
            ),
            None => format!(
                "the UDP service at {address} is bound to {}: it has no address to answer from",
                wildcard.address
            ),
        };
        let fix = match chosen {
            Some(chosen) => {
                let target = SocketAddr::new(chosen, address.port());
                Fix::run(edits::set_target(self.evidence, self.instance, target))
                    .knowing(format!("or bind the service to {address}"))
            }
            None => Fix::advise(format!("bind the service to {address}")),
        };
        let seen = vec![format!(
            "a packet to {} without source: {}",
            self.target.client, self.target.chosen
        )];
        let mut found = self.diagnosis(Fault::WildcardUdp, verdict, seen, fix);
        let process = wildcard.process.as_ref();
        found
            .evidence
            .extend(process.map(|one| format!("{}, pid {}", one.name, one.pid)));
        Some(found)
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

/// `-container-ip 172.17.0.2 -container-port 80` of docker-proxy's command line.
fn container(process: &Process) -> Option<SocketAddr> {
    let value = |name: &str| {
        let mut words = process.arguments.iter();
        words.find(|word| word.trim_start_matches('-') == name)?;
        words.next()
    };
    Some(SocketAddr::new(
        value("container-ip")?.parse().ok()?,
        value("container-port")?.parse().ok()?,
    ))
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
