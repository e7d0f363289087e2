//! What the doctor says when connections to a service time out: once for each burst of them, in the log
//! of the process that met them.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use super::fleet::Fleet;
use crate::commands::doctor::patients;
use crate::doctor::{self, Asker, Severity};
use crate::relay::counters::ConnectFailure;
use crate::relay::server::Server;

/// How often the counters are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Time-outs that follow each other sooner are one burst.
const BURST: Duration = Duration::from_secs(60);

/// The most verdicts that one burst is worth.
const MOST: usize = 4;

/// What is known of one instance's time-outs.
struct Met {
    count: u64,
    last: Option<Instant>,
}

/// Watches the counters of every relay, and asks the doctor about those that begin to time out. Ends never.
pub(super) async fn watch(fleet: Rc<Fleet>, asker: Asker) {
    let mut met = BTreeMap::<String, Met>::new();
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let began = begun(&fleet, &mut met);
        if !began.is_empty() {
            examine(&fleet, &asker, &began).await;
        }
    }
}

/// How many connections and flows got no answer.
fn unanswered(server: &Server) -> u64 {
    let flows = server.datagrams().map_or(0, |udp| udp.flows_unanswered);
    server.totals().connect_failed.of(ConnectFailure::TimedOut) + flows
}

/// The instances in which a burst has begun.
fn begun(fleet: &Fleet, met: &mut BTreeMap<String, Met>) -> BTreeSet<String> {
    let supervisor = fleet.supervisor.borrow();
    let mut began = BTreeSet::new();
    for (name, _) in fleet.statuses() {
        let Some(relay) = supervisor.task(&name) else {
            continue;
        };
        let count = unanswered(&relay.server);
        let known = met.entry(name.clone()).or_insert(Met {
            count: 0,
            last: None,
        });
        // a relay that was started anew counts from nothing
        if count > known.count {
            let quiet = known.last.is_none_or(|last| last.elapsed() >= BURST);
            known.last = Some(Instant::now());
            if quiet {
                began.insert(name);
            }
        }
        known.count = count;
    }
    began
}

async fn examine(fleet: &Fleet, asker: &Asker, names: &BTreeSet<String>) {
    let configuration = Rc::clone(&fleet.world.configuration.borrow());
    // what this process would say about itself is what it has logged already
    let nothing = BTreeMap::new();
    let asked: Vec<_> = configuration
        .instances
        .iter()
        .filter(|instance| names.contains(instance.name.as_str()))
        .filter_map(|instance| patients::asked(&configuration, instance, &nothing))
        .collect();
    let asker = asker.clone();
    // blocking, and in this thread's network namespace, which its children share
    let examined = tokio::task::spawn_blocking(move || doctor::examine(&asked, &asker)).await;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let instances = names.join(", ");
    match examined {
        Ok(Ok(examination)) => {
            let faults = examination.diagnoses.iter();
            let faults = faults.filter(|one| one.severity == Severity::Fault);
            let mut said = 0;
            let maker = fleet.world.maker;
            for one in faults.take(MOST) {
                warn!(instances, fault = %one.fault, "diagnosis: {}: {}", one.verdict, maker.remedy(one));
                said += 1;
            }
            if said == 0 {
                info!(
                    instances,
                    "diagnosis: a spoofed connection is answered now; what was lost before is unknown"
                );
            }
        }
        Ok(Err(error)) => warn!(instances, %error, "no diagnosis"),
        Err(error) => warn!(instances, %error, "no diagnosis"),
    }
}
