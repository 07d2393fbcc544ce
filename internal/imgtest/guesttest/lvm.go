package guesttest

import (
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// VG is a volume group on physical volumes that fill images.
type VG struct {
	t      testing.TB
	filter string
	detach []func()
}

// NewVG makes a volume group named vg in images, with extents of 1 MiB.
func NewVG(t testing.TB, paths ...string) *VG {
	t.Helper()
	imgtest.Require(t, "lvm")
	v := &VG{t: t}
	var devices []string
	for _, path := range paths {
		device, detach := Loop(t, path)
		v.detach = append(v.detach, detach)
		devices = append(devices, device)
		v.filter += fmt.Sprintf(`"a|^%s$|",`, device)
	}
	v.Run("pvcreate", append([]string{"-q"}, devices...)...)
	v.Run("vgcreate", append([]string{"-q", "-s", "1M", "vg"}, devices...)...)
	return v
}

// Run runs a command of LVM2, which sees these physical volumes alone and never
// asks the kernel for anything: what is made cannot be activated.
func (v *VG) Run(command string, args ...string) string {
	v.t.Helper()
	only := "devices { global_filter=[" + v.filter + `"r|.*|"] }`
	return string(imgtest.Run(v.t, "lvm", append([]string{command, "--driverloaded", "n", "--config", only}, args...)...))
}

// Close lets go of the images.
func (v *VG) Close() {
	for _, detach := range v.detach {
		detach()
	}
}

// Create makes a logical volume.
func (v *VG) Create(name string, args ...string) {
	v.t.Helper()
	v.Run("lvcreate", append([]string{"-q", "-an", "-Zn", "-Wn", "-n", name}, append(args, "vg")...)...)
}
