//! The diagnosis in `run`'s own log, once for each burst of time-outs.

use super::clinic;
use crate::support::net::wait_for;

#[test]
fn a_burst_of_timeouts_is_diagnosed_once() {
    let scratch = tempfile::tempdir().unwrap();
    let mut clinic = clinic(scratch.path());
    clinic
        .run("sed -i '/^own\\t/s/$/\\tconnect-timeout=300ms/' \"$DIR/etc/instances.tsv\"; mmproxyctl -q pathway add --all")
        .unwrap();
    clinic
        .daemon("exec mmproxyctl --log-format text run own")
        .unwrap();
    clinic
        .run("listening 2202; ip rule del priority 100 from 10.0.0.2")
        .unwrap();
    let log = || std::fs::read_to_string(scratch.path().join("daemon-0.log")).unwrap();
    for _ in 0..3 {
        let _ = clinic.output("proxy 2202").unwrap();
    }
    wait_for("a diagnosis", || log().contains("diagnosis: "));
    // more of the same burst
    for _ in 0..2 {
        let _ = clinic.output("proxy 2202").unwrap();
    }
    wait_for("the last of them", || {
        log().matches("no answer from 10.0.0.2:8081").count() >= 5
    });
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let log = log();
    let verdicts: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("diagnosis: "))
        .collect();
    assert_eq!(verdicts.len(), 1, "{log}");
    assert!(verdicts[0].contains("IPv4 rule missing"), "{log}");
    assert!(
        verdicts[0].contains("from 10.0.0.2/32 fwmark 0x7b/0xff lookup 123"),
        "{log}"
    );
    assert!(
        verdicts[0].contains(": mmproxyctl pathway add 123 "),
        "{log}"
    );
}
