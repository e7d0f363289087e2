//! `mmproxyctl link`.

use super::lab::Old;

#[test]
fn links_are_made_once_and_nothing_else_is_replaced() {
    let old = Old::new();
    let bin = old.link("");
    let link = |dir: &std::path::Path| {
        old.lab
            .wks
            .mmproxyctl(&format!("link --dir {}", dir.display()))
            .output()
            .expect("mmproxyctl")
    };
    for name in ["go-mmproxy", "mmproxy"] {
        let to = std::fs::read_link(old.link(name)).expect("a link");
        assert_eq!(to.to_str(), Some(env!("CARGO_BIN_EXE_mmproxyctl")));
    }
    let again = link(&bin);
    assert!(again.status.success(), "{again:?}");
    assert_eq!(
        String::from_utf8_lossy(&again.stdout)
            .matches("unchanged")
            .count(),
        2
    );

    let other = old.lab.wks.write("other/mmproxy", "another program");
    let refused = link(other.parent().expect("a directory"));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    assert_eq!(
        std::fs::read_to_string(&other).expect("still there"),
        "another program"
    );
    assert!(!other.with_file_name("go-mmproxy").exists());
    assert_eq!(link(&bin.join("none")).status.code(), Some(1));
}
