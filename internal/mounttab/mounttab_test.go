package mounttab

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	const table = `22 27 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw
36 35 98:0 /mnt1 /a\040b\134c rw,noatime master:1 propagate_from:2 - ext3 /dev/root\011x rw,errors=continue
40 1 0:50 / /m ro,nodev - fuse.mount-image /x\040y.qcow2 ro,user_id=1000,group_id=100,allow_other
41 1 0:51 / /n rw - tmpfs  rw
`
	got, err := parse(strings.NewReader(table))
	if err != nil {
		t.Fatal(err)
	}
	want := []Mount{
		{Dev: "0:20", Dir: "/sys", Type: "sysfs", Source: "sysfs", Options: "rw"},
		{Dev: "98:0", Dir: `/a b\c`, Type: "ext3", Source: "/dev/root\tx", Options: "rw,errors=continue"},
		{Dev: "0:50", Dir: "/m", Type: "fuse.mount-image", Source: "/x y.qcow2", Options: "ro,user_id=1000,group_id=100,allow_other"},
		{Dev: "0:51", Dir: "/n", Type: "tmpfs", Source: "", Options: "rw"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if v, ok := got[2].Option("user_id"); !ok || v != "1000" {
		t.Errorf("user_id: %q %v", v, ok)
	}
	if _, ok := got[2].Option("allow_other"); !ok {
		t.Error("allow_other not found")
	}
	if _, ok := got[2].Option("user"); ok {
		t.Error("option by a prefix of its name")
	}
	if _, err := parse(strings.NewReader("nonsense\n")); err == nil {
		t.Error("nonsense accepted")
	}
}

func TestFindAndResolve(t *testing.T) {
	m, found, err := Find("/proc")
	if err != nil || !found || m.Type != "proc" {
		t.Errorf("/proc: %+v %v %v", m, found, err)
	}
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, found, err := Find(dir); found || err != nil {
		t.Errorf("%s: %v %v", dir, found, err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(".", link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, link, link + "/link/.", dir + "/x/.."} {
		if got, err := Resolve(path); err != nil || got != dir {
			t.Errorf("resolve %s: %q %v", path, got, err)
		}
	}
	if got, err := Resolve(link + "/missing"); err != nil || got != dir+"/missing" {
		t.Errorf("what cannot be looked at: %q %v", got, err)
	}
}
