//! The doctor on real hosts: each fault injected, named, mended with what was printed, and healthy again;
//! and hosts that are healthy, of which nothing is said.

#![expect(
    clippy::unwrap_used,
    reason = "clippy does not take functions that tests share for tests"
)]

mod faults;
#[cfg(feature = "soak")]
mod full;
mod healthy;
mod networkd;
mod running;
mod table;

use std::path::Path;

use mmproxyctl::causes::with_causes;
use mmproxyctl::demo::clinic::Clinic;
use mmproxyctl::doctor::{Diagnosis, Evidence, Fault, Severity};
use serde::Deserialize;

/// What `doctor --json` writes.
#[derive(Debug, Deserialize)]
pub(crate) struct Answer {
    pub(crate) healthy: bool,
    pub(crate) diagnoses: Vec<Diagnosis>,
    pub(crate) evidence: Evidence,
}

impl Answer {
    /// The faults, without notes.
    pub(crate) fn faults(&self) -> Vec<Fault> {
        let faults = self.diagnoses.iter();
        let mut faults: Vec<_> = faults
            .filter(|one| one.severity == Severity::Fault)
            .map(|one| one.fault)
            .collect();
        faults.dedup();
        faults
    }
}

/// Four hosts in a scratch directory of their own.
pub(crate) fn clinic(directory: &Path) -> Clinic {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests build network namespaces: run them as root (sudo ./tests/run.sh)"
    );
    let program = Path::new(env!("CARGO_BIN_EXE_mmproxyctl"));
    Clinic::build(directory, program).unwrap_or_else(|error| panic!("{}", with_causes(&error)))
}

/// `doctor --json` and its exit code, which must fit the answer.
pub(crate) fn ask(clinic: &Clinic, under: &str, words: &str) -> Result<Answer, String> {
    let command = format!("{under} mmproxyctl doctor --json {words}");
    let output = clinic
        .output(&command)
        .map_err(|error| with_causes(&error))?;
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    let answer: Answer =
        serde_json::from_str(&out).map_err(|error| format!("{command}: {error}: {out}{err}"))?;
    let code = output.status.code();
    if code != Some(i32::from(!answer.healthy)) {
        return Err(format!("{command}: exit code {code:?}: {out}{err}"));
    }
    Ok(answer)
}
