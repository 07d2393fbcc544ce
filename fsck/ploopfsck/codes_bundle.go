package ploopfsck

import "github.com/imagestack/imagestack/fsck"

// What can be done about a descriptor that repair does not decide.
const (
	fromBackup = " Else correct the descriptor by hand or from a backup (DiskDescriptor.xml.undo, if a repair changed it); ploop restore-descriptor makes a new one for a single image."
)

// Codes of the descriptor.
var (
	codeXML = fsck.Register("ploop.descriptor.xml", fsck.Fatal,
		"The descriptor is no well-formed XML document of a sane size.",
		"-y writes a new one where the directory holds one sound image and nothing else that could be part of the disk."+fromBackup)
	codeDescriptor = fsck.Register("ploop.descriptor.refused", fsck.Damage,
		"The descriptor is refused for a reason that has no code of its own.", "Nothing is repaired."+fromBackup)
	codeDescStructure = fsck.Register("ploop.descriptor.structure", fsck.Fatal,
		"A necessary part of the descriptor is missing.",
		"-y writes a new one where the directory holds one sound image and nothing else that could be part of the disk."+fromBackup)
	codeDescNumber = fsck.Register("ploop.descriptor.number", fsck.Damage,
		"A value of the descriptor is not the number that it has to be.",
		"-p and -y set it where the other values of the descriptor and the sound headers of the images agree on it, -y also where only one of these tells."+fromBackup)
	codeDescSize = fsck.Register("ploop.descriptor.size", fsck.Damage,
		"Disk_size and the range of the Storage contradict each other.",
		"-p and -y set both to the one that the sound header of the top image confirms."+fromBackup)
	codeDescGUID = fsck.Register("ploop.descriptor.guid", fsck.Damage,
		"A GUID is malformed.",
		"-y sets it where only one is left that it can be: that of the only snapshot without an image, or the other way round; a parent and the current state as with the codes parent and top."+fromBackup)
	codeDescDuplicate = fsck.Register("ploop.descriptor.duplicate", fsck.Damage,
		"Two images or snapshots have the same GUID or file.", "Nothing is repaired: nothing tells which of the two is right."+fromBackup)
	codeDescType = fsck.Register("ploop.descriptor.type", fsck.Damage,
		"The type of an image is neither Plain nor Compressed.",
		"-y sets that of the other images, which all have the same, or that of a single sound image."+fromBackup)
	codeDescFile = fsck.Register("ploop.descriptor.file", fsck.Damage,
		"The file name of an image is empty or impossible.",
		"-y names the only image in the directory that nothing names, if it fits."+fromBackup)
	codeDescMissing = fsck.Register("ploop.descriptor.image-missing", fsck.Damage,
		"An image that the descriptor names does not exist. Fatal where the current state stands on it.",
		"Bring the file back. Else -y names the file of this name beside the descriptor, where the bundle was moved, or the only image there that nothing names, if it fits; a snapshot on which nothing stands is taken out of the descriptor.")
	codeDescNoImage = fsck.Register("ploop.descriptor.snapshot-without-image", fsck.Damage,
		"A snapshot has no image.",
		"-y names the only image in the directory that nothing names, if it fits; else a snapshot on which nothing stands is taken out of the descriptor."+fromBackup)
	codeDescNoShot = fsck.Register("ploop.descriptor.image-without-snapshot", fsck.Damage,
		"An image has no snapshot, so nothing tells where it belongs.",
		"-y gives it the GUID of the only snapshot without an image; the current state is entered over the only snapshot that is no other's parent; any other image is taken out of the descriptor, and its file stays."+fromBackup)
	codeDescTop = fsck.Register("ploop.descriptor.top", fsck.Damage,
		"The current top is no snapshot of the bundle.",
		"-y sets TopGUID to the snapshot that has the constant name of the top, or to the only one that is no other's parent."+fromBackup)
	codeDescParent = fsck.Register("ploop.descriptor.parent", fsck.Damage,
		"The parent of a snapshot does not exist.",
		"-y makes it the base if there is none, else it gets the only snapshot as parent on which nothing stands and that is not longer."+fromBackup)
	codeDescLoop = fsck.Register("ploop.descriptor.loop", fsck.Damage,
		"Snapshots are each other's parents.",
		"-y cuts the loop where the current state, which is never a parent, is named as one, or where a snapshot is its own parent, and then does as with the code parent."+fromBackup)
	codeDescUnsupported = fsck.Register("ploop.descriptor.unsupported", fsck.Damage,
		"The descriptor uses encryption, a parent volume or a split disk, which is not supported.",
		"Nothing is repaired. Use the tools of Virtuozzo.")
)

// Codes of a bundle: the descriptor and the files beside it.
var (
	codeBundleSize = fsck.Register("stack.bundle.size-mismatch", fsck.Damage,
		"An image of a ploop bundle is not as long as the descriptor says the disk is.",
		"-y sets the size in the descriptor to that in the sound header of the top image. If the disk was being grown, grow it again after that. A lower image that is longer than the disk belongs to another disk or another place: bring the right file back.")
	codeBundleCluster = fsck.Register("stack.bundle.cluster-mismatch", fsck.Damage,
		"An image of a ploop bundle has another cluster size than the descriptor says.",
		"-p and -y set Blocksize to the cluster size on which all images agree. An image whose cluster size differs from the others' belongs to another disk: bring the right file back.")
	codeBundleVersions = fsck.Register("stack.bundle.version-mixed", fsck.Note,
		"The images of a ploop bundle are of different versions. It can be read, but the kernel drivers refuse it.",
		"Nothing is repaired here. ploop convert -v 2 DiskDescriptor.xml makes them equal.")
	codeBundleOrphan = fsck.Register("stack.bundle.orphan-image", fsck.Note,
		"A ploop image lies in the directory of a bundle whose descriptor does not name it: left behind by an interrupted operation, or put there by somebody.",
		"Nothing is done: others may know what it is. Look at it (image-stack info --format ploop), and move it away if nobody needs it.")
	codeBundleTopTemporary = fsck.Register("stack.bundle.top-temporary", fsck.Damage,
		"The current state of a ploop bundle is marked as a temporary snapshot. ploop refuses the bundle.",
		"-y takes the mark away; the state stays.")
	codeBundleTemporary = fsck.Register("stack.bundle.temporary-snapshot", fsck.Note,
		"The bundle has a temporary snapshot, which backup tools make and remove. If no backup is running it was left behind and its image grows for ever.",
		"Nothing is done, for merging moves data: ploop snapshot-delete -u GUID DiskDescriptor.xml does it, once no backup is running.")
)
