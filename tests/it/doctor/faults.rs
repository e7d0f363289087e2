//! Each fault injected for real: named first and alone, mended with exactly what was printed, healthy again.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use mmproxyctl::causes::with_causes;
use mmproxyctl::demo::clinic::ills::{self, Ill, Remedy};

use super::table::{self, Row};
use super::{Answer, ask, clinic};

/// They mostly wait for answers that do not come.
const AT_ONCE: usize = 8;

#[test]
fn every_fault_is_named_and_mended() {
    // one at a time while a new one is written: DOCTOR_ONLY='part of what is done'
    let only = std::env::var("DOCTOR_ONLY").unwrap_or_default();
    let ills: Vec<Ill> = ills::all()
        .into_iter()
        .filter(|ill| ill.what.contains(&only) || ill.fault.contains(&only))
        .collect();
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((at, ill)) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    ills.get(at).map(|ill| (at, ill))
                } {
                    let row = case(ill);
                    rows.lock().unwrap().insert(at, row);
                }
            });
        }
    });
    let rows = rows.into_inner().unwrap().into_values();
    let (rows, failed): (Vec<_>, Vec<_>) = rows.partition(Result::is_ok);
    let failed: Vec<String> = failed.into_iter().filter_map(Result::err).collect();
    assert!(
        failed.is_empty(),
        "{} of {}:\n\n{}",
        failed.len(),
        ills.len(),
        failed.join("\n\n")
    );
    if only.is_empty() {
        let rows: Vec<Row> = rows.into_iter().filter_map(Result::ok).collect();
        table::assert_current("faults", &table::of_faults(&rows));
    }
}

fn case(ill: &Ill) -> Result<Row, String> {
    let scratch = tempfile::tempdir().unwrap();
    let failed = |what: &str, answer: &Answer| {
        let said = serde_json::to_string_pretty(&answer.diagnoses).unwrap();
        let seen = serde_json::to_string(&answer.evidence.instances).unwrap();
        format!("== {} ({}): {what}:\n{said}\n{seen}", ill.what, ill.fault)
    };
    let broke = |error: mmproxyctl::demo::clinic::Error| {
        format!("== {} ({}): {}", ill.what, ill.fault, with_causes(&error))
    };
    let mut clinic = clinic(scratch.path());
    clinic.fall_ill(ill).map_err(broke)?;
    let sick = ask(&clinic, ill.under, ill.ask)?;
    let named: Vec<String> = sick.faults().iter().map(ToString::to_string).collect();
    if named != [ill.fault] {
        return Err(failed(&format!("found {named:?}"), &sick));
    }
    let printed: Vec<_> = sick
        .diagnoses
        .iter()
        .flat_map(|one| {
            one.fix
                .commands
                .iter()
                .map(|command| (one.fix.on, command.as_str()))
        })
        .collect();
    let ours = sick.diagnoses.iter().all(|one| one.fix.pathway.is_some());
    if ours {
        // what is ours is mended by --fix as well: one way for each family
        let fixed = if ill.what.contains("-6") || ill.what.contains("IPv6") {
            let fixed = ask(&clinic, ill.under, &format!("--fix {}", ill.ask))?;
            if !fixed.healthy {
                return Err(failed("--fix did not mend it", &fixed));
            }
            true
        } else {
            false
        };
        if !fixed {
            clinic.mend(ill, &printed).map_err(broke)?;
        }
    } else {
        if ill.remedy == Remedy::Printed && printed.is_empty() {
            return Err(failed("no fix is printed", &sick));
        }
        clinic.mend(ill, &printed).map_err(broke)?;
    }
    let well = ask(&clinic, "", ill.ask)?;
    if !well.healthy {
        return Err(failed("still ill", &well));
    }
    Ok(Row::of(ill, &sick.diagnoses, &clinic.config()))
}
