package guesttest

import (
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// VG is a volume group on one physical volume, which fills an image.
type VG struct {
	t     testing.TB
	dev   string
	Close func() // lets go of the image
}

// NewVG makes a volume group named vg in an image, with extents of 1 MiB.
func NewVG(t testing.TB, path string) *VG {
	t.Helper()
	imgtest.Require(t, "lvm")
	dev, detach := Loop(t, path)
	v := &VG{t, dev, detach}
	v.Run("pvcreate", "-q", v.dev)
	v.Run("vgcreate", "-q", "-s", "1M", "vg", v.dev)
	return v
}

// Run runs a command of LVM2, which sees this physical volume alone and never
// asks the kernel for anything: what is made cannot be activated.
func (v *VG) Run(command string, args ...string) string {
	v.t.Helper()
	only := fmt.Sprintf(`devices { global_filter=["a|^%s$|","r|.*|"] }`, v.dev)
	return string(imgtest.Run(v.t, "lvm", append([]string{command, "--driverloaded", "n", "--config", only}, args...)...))
}

// Create makes a logical volume.
func (v *VG) Create(name string, args ...string) {
	v.t.Helper()
	v.Run("lvcreate", append([]string{"-q", "-an", "-Zn", "-Wn", "-n", name}, append(args, "vg")...)...)
}
