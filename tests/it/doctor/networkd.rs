//! A real systemd-networkd that removes foreign rules: named, and gone with the settings that are printed.

use std::net::TcpListener;

use mmproxyctl::doctor::Fault;

use super::Answer;
use crate::support::net::Host;
use crate::systemd::Systemd;

const FILES: &str = r"
printf '123\n' >/etc/mmproxy/pathways.conf
printf 'local\t123\t127.0.0.1:2201\t127.0.0.1\t8080\t-\n' >/etc/mmproxy/instances.tsv
printf '127.0.0.1\n' >/etc/mmproxy/allow.txt
";

fn ask(systemd: &Systemd) -> Answer {
    let output = systemd.try_run("mmproxyctl doctor --json");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{error}: {}", String::from_utf8_lossy(&output.stderr));
    })
}

#[test]
fn a_networkd_that_removes_foreign_rules() {
    let host = Host::new("networkd");
    let _service = host.enter(|| TcpListener::bind("127.0.0.1:8080").unwrap());
    let systemd = Systemd::boot(&host);
    systemd.run_script(FILES);
    systemd.run("mmproxyctl -q pathway add --all");
    let before = ask(&systemd);
    assert!(before.healthy, "{:#?}", before.diagnoses);

    systemd.run("systemctl start systemd-networkd");
    // what it removes as it starts is not what is asked about here
    systemd.run("mmproxyctl -q pathway add --all");
    let ill = ask(&systemd);
    assert_eq!(
        ill.faults(),
        [Fault::NetworkdRemovesRules],
        "{:#?}",
        ill.diagnoses
    );
    for command in &ill.diagnoses[0].fix.commands {
        systemd.run_script(command);
    }
    let well = ask(&systemd);
    assert!(well.healthy, "{:#?}", well.diagnoses);
    // and it holds: without the settings a restart takes the rules away
    systemd.run("systemctl restart systemd-networkd");
    assert!(ask(&systemd).healthy);
}
