//! Connection tracking's table, really full: its size is the whole machine's, so it takes a quarter of a
//! million entries.

use std::fmt::Write;

use mmproxyctl::doctor::Fault;

use super::{ask, clinic};

#[test]
fn a_full_table_of_connection_tracking() {
    let scratch = tempfile::tempdir().unwrap();
    let clinic = clinic(scratch.path());
    clinic.run("mmproxyctl -q pathway add --all").unwrap();
    assert!(ask(&clinic, "", "own").unwrap().healthy);
    let size = clinic
        .run("sysctl -n net.netfilter.nf_conntrack_max")
        .unwrap();
    let size: u32 = size.trim().parse().unwrap();
    let mut entries = String::new();
    for number in 0..=size {
        let [_, a, b, c] = number.to_be_bytes();
        writeln!(
            entries,
            "-I -p tcp -s 10.{a}.{b}.{c} -d 10.200.0.1 --sport 1 --dport 2 --state ESTABLISHED -t 600 -u SEEN_REPLY,ASSURED"
        )
        .unwrap();
    }
    std::fs::write(scratch.path().join("entries"), entries).unwrap();
    // the last ones are refused
    let _ = clinic.output("conntrack -R \"$DIR/entries\"").unwrap();
    let full = ask(&clinic, "", "own").unwrap();
    assert!(
        full.faults().contains(&Fault::ConntrackFull),
        "{:#?}",
        full.diagnoses
    );
    assert_eq!(full.diagnoses[0].fix.commands.len(), 1);
    // the printed command changes the size for the whole machine: here the table is emptied instead
    clinic.run("conntrack -F").unwrap();
    let well = ask(&clinic, "", "own").unwrap();
    assert!(well.healthy, "{:#?}", well.diagnoses);
}
