package ploopfsck

import "github.com/imagestack/imagestack/fsck"

// Codes of the header.
var (
	codeShort = fsck.Register("ploop.header.short", fsck.Fatal,
		"The file is shorter than a header.",
		"Restore the image from a backup.")
	codeSignature = fsck.Register("ploop.header.signature", fsck.Fatal,
		"The signature is neither that of version 1 nor that of version 2.",
		"-y restores a signature of which at least 12 bytes are left, if everything else fits. Else this is no ploop image: check the format.")
	codeType = fsck.Register("ploop.header.type", fsck.Damage,
		"m_Type is not 2. No program opens the image.",
		"-y sets it to 2, the only value there is.")
	codeGeometry = fsck.Register("ploop.header.geometry", fsck.Fatal,
		"Cluster size, disk size, number of BAT entries and beginning of the data contradict each other in more than one way.",
		"Restore the first 64 bytes from a dump of the metadata, or the image from a backup.")
	codeCluster = fsck.Register("ploop.header.cluster-size", fsck.Damage,
		"m_Sectors, the cluster size, is impossible or contradicts all other fields.",
		"-y sets the only cluster size that fits the other fields.")
	codeClusterOdd = fsck.Register("ploop.header.cluster-size-odd", fsck.Note,
		"The cluster size is not a power of two from 32 KiB to 64 MiB. QEMU can make and use such images, ploop and its drivers cannot.",
		"Nothing as long as QEMU is used; else convert the image.")
	codeDiskSize = fsck.Register("ploop.header.disk-size", fsck.Damage,
		"m_SizeInSectors, the size of the disk, contradicts the number of BAT entries.",
		"-y sets the size that the BAT is made for. What would lie behind is lost.")
	codeBATSize = fsck.Register("ploop.header.bat-size", fsck.Damage,
		"m_Size, the number of BAT entries, does not fit the size of the disk.",
		"-y sets the number that the disk needs.")
	codeBATLonger = fsck.Register("ploop.header.bat-longer", fsck.Note,
		"The BAT has more entries than the disk has clusters.",
		"Nothing: they are empty. The old kernel driver expects the exact number.")
	codeFirstBlock = fsck.Register("ploop.header.first-block", fsck.Damage,
		"m_FirstBlockOffset, where the data begins, is 0, not a multiple of the cluster size, inside the BAT or behind the file.",
		"-y sets the first cluster boundary behind the BAT.")
	codeFirstBlockLate = fsck.Register("ploop.header.first-block-late", fsck.Note,
		"The data begins later than the first cluster boundary behind the BAT.",
		"Nothing; but the kernel driver demands the exact place. Converting the image gives it that.")
	codeHighWord = fsck.Register("ploop.header.size-high-word", fsck.Note,
		"The high half of m_SizeInSectors is not 0 in an image of version 1, where only the low half is the size.",
		"-p and -y zero it.")
	codePartial = fsck.Register("ploop.header.partial-cluster", fsck.Note,
		"The size of the disk is not a multiple of the cluster size.",
		"Nothing; ploop's snapshot and grow commands and the old kernel driver expect whole clusters.")
	codeInUse = fsck.Register("ploop.header.in-use", fsck.Leak,
		"The image was not closed by its last user, who has crashed. QEMU and ploop refuse it until it was checked.",
		"-p and -y mark it as closed once nothing is wrong with it.")
	codeInUseValue = fsck.Register("ploop.header.in-use-value", fsck.Damage,
		"m_DiskInUse has a value that nobody writes.",
		"-p and -y mark the image as closed once nothing else is wrong with it.")
	codeV21 = fsck.Register("ploop.header.v21-without-extension", fsck.Note,
		"The image is marked as closed by software that maintains the format extension, but has none. Old ploop takes that for not closed.",
		"-p and -y mark it as closed in the old way.")
	codeEmptySet = fsck.Register("ploop.header.empty-set", fsck.Note,
		"CIF_Empty says that nothing is allocated, but there is data. QEMU, and ploop when it grows a disk, leave it so.",
		"-p and -y clear it.")
	codeEmptyMissing = fsck.Register("ploop.header.empty-missing", fsck.Note,
		"Nothing is allocated, but CIF_Empty does not say so. QEMU leaves it so.",
		"-p and -y set it.")
	codeConverting = fsck.Register("ploop.header.converting", fsck.Fatal,
		"A conversion between version 1 and 2 was interrupted (CIF_FmtVersionConvert). Entries of the BAT may be in either form.",
		"-p and -y go back to the BAT that the conversion has saved as IMAGE.idx beside the image, or finish it where another image of the bundle has been finished; nothing is lost either way. Without that file -y clears the flag if the whole BAT is valid in the form of the header; else nothing is repaired until IMAGE.idx is brought back. Remove IMAGE.idx afterwards.")
	codeFlags = fsck.Register("ploop.header.unknown-flags", fsck.Note,
		"m_Flags has bits whose meaning is not known.",
		"Nothing: they are kept.")
)

// lostEntry is what happens to an entry that points to no cluster.
const lostEntry = "-y lets it point to the cluster between those of its neighbours if nothing else uses that; else it is emptied, so that zeros, or what a parent has there, show (an image that is known to have a parent gets a cluster of zeros instead). The guest range is named as lost."

// Codes of the BAT.
var (
	codeUnreadable = fsck.Register("ploop.io.unreadable", fsck.Damage,
		"A part of the metadata cannot be read.",
		"Copy the image to a healthy disk (ddrescue) and check the copy.")
	codeCutOff = fsck.Register("ploop.bat.cut-off", fsck.Fatal,
		"The file ends inside the header and BAT area. There is no data in it.",
		"-y completes the BAT area with zeros; everything that the disk held is lost.")
	codeForeign = fsck.Register("ploop.bat.sector-layout", fsck.Fatal,
		"Most entries are not multiples of the cluster size, as in images of early Parallels versions, whose clusters lie on sectors. Nothing here or in ploop supports that layout.",
		"Convert the image with qemu-img convert -f parallels. Nothing is repaired.")
	codeInvalid = fsck.Register("ploop.bat.invalid", fsck.Damage,
		"An entry is 0xffffffff, which no program accepts.",
		lostEntry)
	codeUnaligned = fsck.Register("ploop.bat.unaligned", fsck.Damage,
		"An entry of version 1 is not a multiple of the cluster size.",
		lostEntry+" What an emptied entry pointed to is copied into lost+found.")
	codeMetadata = fsck.Register("ploop.bat.into-metadata", fsck.Damage,
		"An entry points into the header or the BAT. A write of the guest would destroy the image.",
		lostEntry)
	codePastEOF = fsck.Register("ploop.bat.past-eof", fsck.Damage,
		"An entry points to or behind the end of the file.",
		lostEntry+" If the file was cut off, bring the rest back first.")
	codeTruncated = fsck.Register("ploop.bat.truncated-cluster", fsck.Damage,
		"The file ends inside a cluster that is in use.",
		"-y completes the cluster with zeros. What was cut off is lost, the rest is kept. -p does it where only bytes behind the end of the disk are missing.")
	codeBeyond = fsck.Register("ploop.bat.beyond-disk", fsck.Damage,
		"An entry behind the end of the disk is not empty.",
		"-p and -y empty it if the sizes in the header agree, else only -y does. A cluster to which it points is copied into lost+found.")
	codeDuplicate = fsck.Register("ploop.bat.duplicate", fsck.Damage,
		"Several entries point to the same cluster: guest ranges show each other's data, and a write to one changes all.",
		"-y leaves the cluster to those that the guest filesystem does not prove to be free: the first keeps it, the others get copies, free ones are emptied. More than 16 claims on one cluster are no accident; those from the 17th on are emptied, and so are those for which more would have to be copied than the image takes, or 1 GiB. All ranges that may show foreign data are named.")
)

// Codes of the format extension.
var (
	codeExtOffset = fsck.Register("ploop.extension.offset", fsck.Damage,
		"m_FormatExtensionOffset points to nothing that can be a format extension.",
		"-y moves an extension that is sound, but at no place of a cluster, into a cluster of its own; the guest range on which it lies is named as lost. Else -p and -y keep what is there in lost+found and drop it: dirty bitmaps of backup tools are gone, and the next backup is a full one.")
	codeExtBytes = fsck.Register("ploop.extension.offset-in-bytes", fsck.Damage,
		"m_FormatExtensionOffset is in bytes, where sectors are expected; the extension itself is sound.",
		"-p and -y correct the unit.")
	codeExtMagic = fsck.Register("ploop.extension.magic", fsck.Damage,
		"There is no format extension where the header says that there is one.",
		"-p and -y drop it: dirty bitmaps of backup tools are gone, and the next backup is a full one.")
	codeExtSum = fsck.Register("ploop.extension.checksum", fsck.Damage,
		"The checksum of the format extension is wrong.",
		"-p and -y keep its cluster in lost+found and drop it: the next backup is a full one.")
	codeExtElement = fsck.Register("ploop.extension.element", fsck.Damage,
		"The format extension has an impossible element.",
		"-p and -y keep its cluster in lost+found and drop it: the next backup is a full one.")
	codeExtBitmap = fsck.Register("ploop.extension.bitmap", fsck.Damage,
		"A dirty bitmap of the format extension is impossible, or its bits lie outside the file or on the metadata.",
		"-p and -y keep the extension's cluster in lost+found and drop it: the next backup is a full one.")
	codeExtShared = fsck.Register("ploop.extension.shared", fsck.Damage,
		"The format extension, or a dirty bitmap, lies on a cluster of the guest or on another part of the extension.",
		"-y empties the entries if the guest filesystem proves that it does not use what they stand for, and the extension stays. Else it copies the extension into lost+found, drops it, and leaves the cluster to the guest; the guest range, which may have been overwritten, is named as lost.")
	codeExtStale = fsck.Register("ploop.extension.stale", fsck.Damage,
		"The image was last closed, or is in use, by software that does not maintain the format extension: dirty bitmaps no longer say what changed, and a backup made with them would be wrong.",
		"-p and -y keep its cluster in lost+found and drop it: the next backup is a full one.")
)

// Codes of the file.
var (
	codeRagged = fsck.Register("ploop.file.ragged", fsck.Leak,
		"The length of the file is not a multiple of the cluster size; nothing refers to the incomplete cluster, the rest of an interrupted extension.",
		"-p and -y cut it off.")
	codeLeakTail = fsck.Register("ploop.leak.tail", fsck.Leak,
		"Clusters at the end of the file are used by nothing.",
		"-p and -y cut them off. When more clusters are unused than used only -y does, and copies them into lost+found first: entries may be gone without a trace.")
	codeLeakInner = fsck.Register("ploop.leak.inner", fsck.Leak,
		"Clusters inside the file are used by nothing.",
		"-p and -y move clusters from the end of the file into them and shorten it, -p up to 1 GiB and only while fewer are unused than used. Where there is a format extension, or more than fits into the memory allowed, they stay and are only noted; image-compact gives them back.")
	codeLeakSuspect = fsck.Register("ploop.leak.suspect", fsck.Leak,
		"Clusters are used by nothing, and entries of the BAT are damaged: the clusters may be those that the entries have lost.",
		"-y copies them into lost+found. They are given back after that.")
	codeHole = fsck.Register("ploop.host.hole", fsck.Note,
		"The host file has holes, or blocks that were never written, inside clusters in use. QEMU makes such files; ploop before version 8 and the old kernel driver refuse them.",
		"-p and -y write zeros there, up to 1 GiB. More is left: it takes space on the host, and cp --sparse=never or ploop check -S can do it.")
	codeHoleMeta = fsck.Register("ploop.host.hole-metadata", fsck.Note,
		"The host file has holes in the header and BAT area. QEMU makes such files; ploop before version 8 refuses them.",
		"-p and -y write zeros there.")
	codeHoleFree = fsck.Register("ploop.host.hole-free", fsck.Note,
		"The host file has holes in clusters that nothing uses: punched on purpose, or left by a crash. ploop before version 8 refuses them.",
		"Nothing is done: they take no space, and vanish with the clusters.")
)
